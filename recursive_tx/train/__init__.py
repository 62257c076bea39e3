"""Training: `train(Config(...), workdir)` and the parts it is made of."""

from recursive_tx.train.config import Config as Config
from recursive_tx.train.config import EvalConfig as EvalConfig
from recursive_tx.train.loop import train as train
from recursive_tx.train.state import first_state as first_state
from recursive_tx.train.step import TrainState as TrainState
from recursive_tx.train.step import abstract_state as abstract_state
from recursive_tx.train.step import jit_step as jit_step
from recursive_tx.train.step import make_step as make_step
