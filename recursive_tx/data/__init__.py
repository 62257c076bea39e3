"""SeqIO tasks and mixtures -> packed, sharded, resumable batches.

`config` names what is read, `documents` cuts files into documents, `pipeline`
is the SeqIO part (the only module here that imports TensorFlow), `packing`
fits documents into rows, and `stream` joins them into batches. Nothing here
knows about models, meshes or devices.

An example of three documents and rows of seq_len=4, with BOS 1 and EOS 2. Each
document starts with BOS and ends with EOS. A document of n ids has n - 1
predictions, so the last is longer than a row and is cut into two pieces. They
share the id 9, which the first piece predicts and the second reads.

  >>> import numpy as np
  >>> from recursive_tx.data import packing
  >>> documents = [[1, 5, 6, 2], [1, 7, 2], [1, 8, 9, 8, 9, 8, 2]]
  >>> pieces = [packing.split(np.array(ids), 4) for ids in documents]
  >>> print([piece.tolist() for piece in pieces[2]])
  [[1, 8, 9, 8, 9], [9, 8, 2]]

The packer opens a row for the first document (3 of 4 slots) and one for the
second, which does not fit there (2 of 4). The long piece fills a third row,
which is the first to be ready; its rest fills the second row.

  >>> packer = packing.Packer(4)
  >>> for piece in sum(pieces, []):
  ...   packer.add(piece)
  >>> packer.flush()
  >>> batch = packing.batch(packer.ready, 4)
  >>> for name in ('token', 'target', 'segment', 'position'):
  ...   print(f'{name:9}', *batch[f'{name}_BT'].tolist())
  token     [1, 8, 9, 8] [1, 7, 9, 8] [1, 5, 6, 0]
  target    [8, 9, 8, 9] [7, 2, 8, 2] [5, 6, 2, 0]
  segment   [1, 1, 1, 1] [1, 1, 2, 2] [1, 1, 1, 0]
  position  [0, 1, 2, 3] [0, 1, 0, 1] [0, 1, 2, 0]

Attention stays within a segment, so the second row holds two documents that do
not see each other. Segment 0 is padding, and has weight 0 in the loss.
"""

from recursive_tx.data.config import DataConfig, Task
from recursive_tx.data.stream import Heldout, Stream, heldout

__all__ = ['DataConfig', 'Heldout', 'Stream', 'Task', 'heldout']
