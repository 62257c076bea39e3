"""Ahead-of-time compilation: does a run fit a topology, at what cost."""

from recursive_tx.plan.compile import compile_text as compile_text
from recursive_tx.plan.compile import needed_bytes as needed_bytes
from recursive_tx.plan.costs import batch_of as batch_of
from recursive_tx.plan.process import plan as plan
from recursive_tx.plan.report import table as table
from recursive_tx.plan.topology import TOPOLOGIES as TOPOLOGIES
from recursive_tx.plan.topology import devices_of as devices_of
