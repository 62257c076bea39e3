"""Relaxed Recursive Transformers in JAX. Imports neither TensorFlow nor torch.
"""

from recursive_tx.config import ModelConfig as ModelConfig
from recursive_tx.config import Run as Run
from recursive_tx.engine import Engine as Engine
from recursive_tx.engine import Replicas as Replicas
from recursive_tx.engine import Request as Request
from recursive_tx.engine import generate as generate
from recursive_tx.engine.sampling import Sampler as Sampler
from recursive_tx.errors import UserError as UserError
from recursive_tx.exits import Exit as Exit
from recursive_tx.model import Decoder as Decoder
from recursive_tx.store.families import FAMILIES as FAMILIES
from recursive_tx.store.hf import load_hf as load_hf
from recursive_tx.store.hf import save_hf as save_hf
from recursive_tx.store.native import restore as restore
from recursive_tx.store.native import save as save
from recursive_tx.store.opening import load_tokenizer as load_tokenizer
from recursive_tx.store.opening import open as open
from recursive_tx.tying.arithmetic import merge as merge
from recursive_tx.tying.relax import relax as relax
