"""What a run tells: `History`, and its rows read back."""

from recursive_tx.history.history import History as History
from recursive_tx.history.history import LogConfig as LogConfig
from recursive_tx.history.rows import read_metrics as read_metrics
