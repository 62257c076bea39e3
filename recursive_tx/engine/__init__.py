"""Continuous depth-wise batching: prefill, insert, step over one state."""

from recursive_tx.engine.engine import Engine as Engine
from recursive_tx.engine.engine import Event as Event
from recursive_tx.engine.engine import Request as Request
from recursive_tx.engine.generate import generate as generate
from recursive_tx.engine.replicas import Replicas as Replicas
