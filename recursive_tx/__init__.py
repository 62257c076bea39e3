"""Relaxed Recursive Transformers in JAX. Imports neither TensorFlow nor torch.
"""

from recursive_tx.config import ModelConfig as ModelConfig
from recursive_tx.config import Run as Run
from recursive_tx.engine import Engine as Engine
from recursive_tx.engine import Replicas as Replicas
from recursive_tx.engine import Request as Request
from recursive_tx.engine import generate as generate
from recursive_tx.families import FAMILIES as FAMILIES
from recursive_tx.hf import load_hf as load_hf
from recursive_tx.hf import save_hf as save_hf
from recursive_tx.model import Decoder as Decoder
from recursive_tx.relax import relax as relax
from recursive_tx.sampling import Sampler as Sampler
from recursive_tx.saved import restore as restore
from recursive_tx.saved import save as save
from recursive_tx.tying import merge as merge
