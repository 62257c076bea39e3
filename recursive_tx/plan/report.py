"""A plan as a person reads it."""

from typing import Any


def table(found: dict[str, Any]) -> str:
  """The figures of `plan` as text, facts and estimates apart."""
  source = found['source']
  lines = [
      f'{found["chips"]} x {found["chip"]}, mesh {found["mesh"]}, batch'
      f' {found["batch"]} x {found["seq_len"]}, attention'
      f' {found["attention"]}', '', f'MEMORY, GiB a chip ({source})',
      _row('fits' if found['fits'] else 'DOES NOT FIT',
           gib(found['peak_bytes_per_chip']),
           f' of {gib(found["chip_bytes"])}')]
  lines += [_row(name, gib(size)) for name, size in found['bytes'].items()]
  lines += ['', 'ARITHMETIC, TFLOP a chip and step',
            _row('model (by hand)', f'{found["model_flops"] / 1e12:.2f}')]
  if 'compiled_flops' in found:
    lines += [
        _row('compiled', f'{found["compiled_flops"] / 1e12:.2f}',
             '   products, recomputation included'),
        _row('attention kernels', f'{found["kernel_flops"] / 1e12:.2f}',
             '   by their shapes'),
        '', 'COMPILED TRAFFIC, GiB a chip sends in a step']
    lines += [_row(kind, gib(size))
              for kind, size in found['sent_bytes'].items()]
  lines += ['', 'ESTIMATES from the chip\'s published peaks']
  lines += [
      _row('step, all overlapped', f'{found["seconds"]:.3f}',
           f' s   MFU {found["mfu"]:.0%},'
           f' {found["tokens_per_second"]:,.0f} tokens/s'),
      _row('step, none overlapped', f'{found["seconds_serial"]:.3f}', ' s'),
      _row('the run', f'{found["days"]:.2f}',
           f' days for {found["steps"]:,} steps,'
           f' {found["tokens"] / 1e9:.2f} B tokens')]
  if 'largest_batch' in found:
    lines += ['', f'LARGEST BATCH that fits: {found["largest_batch"]}'
              f' sequences ({source})']
  return '\n'.join(lines)


def gib(size: float) -> str:
  """Bytes in GiB."""
  return f'{size / 2**30:.2f}'


def _row(name: str, value: str, more: str = '') -> str:
  # The space stays where the value is wider than its column.
  return f'  {name:22} {value:>11}{more}'
