"""Scores of a model: held-out text."""

from recursive_tx.evaluate.heldout import evaluate as evaluate
