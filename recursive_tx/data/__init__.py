"""SeqIO tasks and mixtures -> packed, sharded, resumable batches.

`config` says what is read, `documents` cuts files into documents, `pipeline`
is the SeqIO part (the only module here that imports TensorFlow), `packing`
fits documents into rows, and `stream` joins them into batches. Nothing here
knows about models, meshes or devices.
"""

from recursive_tx.data.config import DataConfig, Task
from recursive_tx.data.stream import Heldout, Stream, heldout

__all__ = ['DataConfig', 'Heldout', 'Stream', 'Task', 'heldout']
