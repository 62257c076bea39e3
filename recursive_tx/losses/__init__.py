"""Losses on the output of every loop."""

from recursive_tx.losses.terms import DIVERGENCES as DIVERGENCES
from recursive_tx.losses.terms import SAVED as SAVED
from recursive_tx.losses.terms import TERMS as TERMS
from recursive_tx.losses.terms import Head as Head
from recursive_tx.losses.terms import LossConfig as LossConfig
from recursive_tx.losses.terms import divergence as divergence
from recursive_tx.losses.terms import gate_nats as gate_nats
from recursive_tx.losses.terms import next_token_nats as next_token_nats
from recursive_tx.losses.terms import top_divergence as top_divergence
from recursive_tx.losses.terms import total as total
from recursive_tx.losses.terms import uses_gate as uses_gate
from recursive_tx.losses.terms import uses_teacher as uses_teacher
