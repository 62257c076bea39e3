"""Causal attention over grouped heads, by several ways."""

from recursive_tx.attention.attend import attend as attend
from recursive_tx.attention.attend import attend_heads as attend_heads
from recursive_tx.attention.attend import choose as choose
from recursive_tx.attention.attend import visible as visible
