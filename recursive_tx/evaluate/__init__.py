"""Scores of a model: held-out text."""

from recursive_tx.evaluate.heldout import evaluate as evaluate
from recursive_tx.evaluate.report import table as table
