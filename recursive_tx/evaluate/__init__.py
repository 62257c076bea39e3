"""Scores of a model: held-out text, and continuations of contexts."""

from recursive_tx.evaluate.heldout import add_words as add_words
from recursive_tx.evaluate.heldout import evaluate as evaluate
from recursive_tx.evaluate.heldout import evaluate_strided as evaluate_strided
from recursive_tx.evaluate.loglikelihood import Request as Request
from recursive_tx.evaluate.loglikelihood import Scorer as Scorer
from recursive_tx.evaluate.loglikelihood import Scores as Scores
from recursive_tx.evaluate.report import table as table
