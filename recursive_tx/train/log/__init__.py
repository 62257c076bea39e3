"""What a run logs: `History`, and its rows read back."""

from recursive_tx.train.log.log import History as History
from recursive_tx.train.log.log import LogConfig as LogConfig
from recursive_tx.train.log.rows import read_metrics as read_metrics
