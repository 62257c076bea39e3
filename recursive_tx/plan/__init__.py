"""Ahead-of-time compilation: does a run fit a topology, at what cost."""

from recursive_tx.plan.plan import TOPOLOGIES as TOPOLOGIES
from recursive_tx.plan.plan import batch_of as batch_of
from recursive_tx.plan.plan import compile_text as compile_text
from recursive_tx.plan.plan import devices_of as devices_of
from recursive_tx.plan.plan import needed_bytes as needed_bytes
from recursive_tx.plan.plan import plan as plan
from recursive_tx.plan.plan import table as table
