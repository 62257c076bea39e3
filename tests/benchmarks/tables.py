"""Writes the tables of docs/*.md that come from docs/results/*.json.

  python tests/benchmarks/tables.py

A table stands between <!-- NAME --> and <!-- end of NAME -->; NAME is that of
its JSON file and of the function below that makes its rows, headings first. A
test finds a table that does not agree.
"""

import json
import pathlib
import re
import statistics

DOCS = pathlib.Path(__file__).parents[2] / 'docs'
_TABLE = re.compile(r'(<!-- (\w+) -->\n).*?(<!-- end of \2 -->)', re.S)


def compile_time(times):
  medians = {layers: statistics.median(times[layers]) for layers in times}
  first, *_ = medians.values()
  return [('layers', 'seconds', 'ratio')] + [
      (layers, f'{median:.1f}', f'{median / first:.2f}')
      for layers, median in medians.items()]


def memory(rows):
  def mesh(text):
    axes = (part.split('=') for part in text.split(', '))
    return ', '.join(f'{axis} {size}' for axis, size in axes if size != '1')

  return [('chips', 'mesh', 'sequences a chip', 'GiB a chip')] + [
      (f'{row["topology"]} ({row["chip_bytes"] >> 30} GiB)', mesh(row['mesh']),
       str(row['batch'] // row['chips']),
       f'{row["peak_bytes_per_chip"] / 2**30:.2f}') for row in rows]


def relaxation_cost(rows):
  return [('sequences of 2048 a chip', 'recursive, TFLOP', 'relaxed, TFLOP',
           'ratio', 'by hand', 'with thin products')] + [
      (str(row['sequences_per_chip']), f'{row["recursive"] / 1e12:.2f}',
       f'{row["relaxed"] / 1e12:.2f}',
       *(f'{row[key]:.3f}' for key in ('ratio', 'by_hand', 'thin')))
      for row in rows]


def gpu_attention(rows):
  return [('sequences x tokens', 'attention', 'forward, ms',
           'with its gradient, ms')] + [
      (f'{row["B"]} x {row["T"]:,}', row['way'], f'{row["forward_ms"]:.2f}',
       f'{row["both_ms"]:.2f}') for row in rows]


def gpu_speed(rows):
  return [('step', 'attention', 'ms', 'tokens/s', 'TFLOP/s', 'MFU')] + [
      (row['step'], row['attention'], f'{row["ms"]:.0f}',
       f'{row["tokens_per_second"]:,.0f}', f'{row["tflops"]:.0f}',
       f'{row["mfu"]:.1%}') for row in rows]


def gpu_train(rows):
  return [('million tokens', 'seconds', 'KL to the original, nats',
           'next-token loss, nats')] + [
      (f'{row["predicted_tokens"] / 1e6:.2f}', f'{row["seconds"]:.0f}',
       f'{row["distill/loop2"]:.2f}', f'{row["next_token/loop2"]:.2f}')
      for row in rows
      if row.get('step') in (1, 15, 30, 60, 120, 240, 360, 480, 600)]


def gpu_profile(rows):
  found = {step: {row['kernel']: row['ms'] for row in rows
                  if row['step'] == step} for step in ('vanilla', 'relaxed')}
  return [('kernel', *(f'{step}, ms' for step in found))] + [
      (f'`{kernel}`', *(f'{times.get(kernel, 0.0):.1f}'
                        for times in found.values()))
      for kernel in list(found['relaxed'])[:6]]


def smollm2(rows):
  texts = ('wikitext', 'sherlock')
  headings = [f'{what}, {text}' for text in texts
              for what in ('perplexity', 'KL')]
  return [('model', 'parameters but the embedding', *headings)] + [
      (row['model'], f'{row["parameters"] / 1e6:.1f} M', *(
          cell for text in texts for cell in (
              f'{row[f"{text} perplexity"]:,.1f}', f'{row[f"{text} kl"]:.2f}')))
      for row in rows]


def gpu_rows(rows):
  return [('start', 'peak rate', 'loss of the first step',
           'mean loss of the last 40')] + [
      (f'{row["start"]}, seed {row["seed"]}', f'{row["lr"]:g}',
       f'{row["losses"][0]:.2f}', f'{sum(row["losses"][-40:]) / 40:.2f}')
      for row in rows]


def cpu_forms(found):
  return [('what', 'plain, ms', 'as on CPU, ms', 'gain')] + [
      (row['what'], f'{row["plain_ms"]:.2f}', f'{row["cpu_ms"]:.2f}',
       f'{row["gain"]:.2f}') for row in found]


def forms(rows):
  return [('model', 'form', 'program', 'file, MB', 'KL of the check, nats',
           'prompts with equal tokens')] + [
      (row['model'], f'`{row["form"]}`', row['program'],
       f'{row["bytes"] / 1e6:,.0f}', f'{abs(row["kl"]):.0e}',
       f'{row["equal"]} of {row["prompts"]}') for row in rows]


def updated(page: str) -> str:
  """The text of a page with its tables as the JSON files have them."""
  def table(match):
    start, name, end = match.groups()
    found = json.loads((DOCS / 'results' / f'{name}.json').read_text())
    headings, *rows = globals()[name](found)
    lines = [headings, ['---'] * len(headings), *rows]
    return start + ''.join(
        f'| {" | ".join(line)} |\n' for line in lines) + end

  return _TABLE.sub(table, page)


if __name__ == '__main__':
  for path in sorted(DOCS.glob('*.md')):
    path.write_text(updated(path.read_text('utf-8')), 'utf-8')
