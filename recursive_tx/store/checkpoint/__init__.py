"""Checkpoints of a run.

`workdir/checkpoints/STEP/` holds three items: `state` (parameters, optimizer,
step), `data` (the position in the stream, one file per process) and `run` (the
settings and the best score as JSON); and in `files` the sizes of all of it.

Knows trees, bytes and nested dictionaries. Does not know what they mean.
"""

from recursive_tx.store.checkpoint.config import (
    CheckpointConfig as CheckpointConfig,
)
from recursive_tx.store.checkpoint.layout import is_workdir as is_workdir
from recursive_tx.store.checkpoint.layout import latest_step as latest_step
from recursive_tx.store.checkpoint.restore import Latest as Latest
from recursive_tx.store.checkpoint.restore import check_same as check_same
from recursive_tx.store.checkpoint.restore import restore as restore
from recursive_tx.store.checkpoint.save import Checkpoints as Checkpoints
from recursive_tx.store.checkpoint.workdir import (
    check_writable as check_writable,
)
from recursive_tx.store.checkpoint.workdir import (
    set_aside_broken as set_aside_broken,
)
