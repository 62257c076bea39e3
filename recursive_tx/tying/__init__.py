"""Sharing layers: fold, factor, merge; `relax.py` and the fit from data."""

from recursive_tx.tying.arithmetic import INITS as INITS
from recursive_tx.tying.arithmetic import factor as factor
from recursive_tx.tying.arithmetic import fold as fold
from recursive_tx.tying.arithmetic import merge as merge
from recursive_tx.tying.arithmetic import sources as sources
