"""A TFDS dataset made on the spot, and the pieces that batches hold."""




def pieces_of(batches, *, is_all_learnt: bool = True) -> list[list[int]]:
  """The pieces in the batches, found from segments one slot at a time.

  Checks on the way all that a batch promises of its other arrays, also that
  weights are 1 in all segments if all is learnt.
  """
  pieces = []
  for batch in batches:
    assert {array.dtype.name for array in batch.values()} == {
        'int32',
        'float32',
    }
    for token, target, segment, position, weight in zip(
        *(
            batch[f'{name}_BT']
            for name in ('token', 'target', 'segment', 'position', 'weight')
        ),
        strict=True,
    ):
      last = 0
      for t in range(len(token)):
        assert weight[t] in ((segment[t] > 0,) if is_all_learnt else (0, 1))
        if segment[t] == 0:
          assert token[t] == target[t] == position[t] == 0
          assert not segment[t:].any() and not weight[t:].any()
          break
        if segment[t] != last:
          assert segment[t] == last + 1 and position[t] == 0
          pieces.append([int(token[t])])
        else:
          assert position[t] == position[t - 1] + 1
        assert token[t] == pieces[-1][-1]
        pieces[-1].append(int(target[t]))
        last = segment[t]
  return pieces


def make_tfds(directory, name: str) -> None:
  """A prepared TFDS dataset of 60 documents and 2 that are none."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  version = directory / name / '1.0.0'
  version.mkdir(parents=True)
  features = tfds.features.FeaturesDict({'body': tfds.features.Text()})
  path = version / f'{name}-train.tfrecord-00000-of-00001'
  with tf.io.TFRecordWriter(str(path)) as writer:
    for text in (*(f'0x{i}xaaa' for i in range(60)), '', b'\xff'):
      writer.write(features.serialize_example({'body': text}))
  template = tfds.core.ShardedFileTemplate(
      dataset_name=name, data_dir=version, split='train',
      filetype_suffix='tfrecord',
  )
  split = tfds.core.SplitInfo(
      name='train', shard_lengths=[62], num_bytes=0,
      filename_template=template,
  )
  tfds.folder_dataset.write_metadata(
      data_dir=version, features=features, split_infos=[split]
  )
  tfds.core.add_data_dir(str(directory))
