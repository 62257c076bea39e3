"""Tasks scored by this library and by lm-evaluation-harness's `hf` backend.

  python tests/benchmarks/harness.py --checkpoint=DIR [--exported=HF_DIR]
      --include_path=docs/tasks --tasks=piqa_local,copa_local --limit=100

Compares every log-likelihood (the largest difference, over the larger of 1 and
the value), greedy flag and choice, and the time for all requests of a task,
tokenising included: each system in a process of its own, turn by turn, so that
a ratio is of neighbours in time. The table gives medians over the rounds after
a first one, which compiles and is not timed.
`hf` runs in float32 with each batch size of --hf_batch, and counts with the
fastest. Data are read as the tasks name them, from the working directory.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--checkpoint', required=True)
  parser.add_argument('--exported', help='for hf; --checkpoint if not given')
  parser.add_argument('--include_path', required=True)
  parser.add_argument('--tasks', required=True)
  parser.add_argument('--limit', type=int, default=100)
  parser.add_argument('--num_fewshot', type=int, default=0)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--hf_batch', default='1,8,16')
  parser.add_argument('--output')
  parser.add_argument('--serve', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.serve:
    serve(args)
    return
  rows = measure(args)
  if args.output:
    pathlib.Path(args.output).write_text(json.dumps({
        'limit': args.limit, 'num_fewshot': args.num_fewshot,
        'rounds': args.rounds, 'tasks': rows}, indent=2) + '\n')


def measure(args) -> list[dict]:
  """A row for each task, and one for all of them together."""
  systems = ['ours', *(f'hf {size}' for size in args.hf_batch.split(','))]
  servers = {name: subprocess.Popen(
      [sys.executable, __file__, *sys.argv[1:], f'--serve={name}'], text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE) for name in systems}
  tasks = args.tasks.split(',')
  for server in servers.values():
    _answer(server, 'ready')
  found = {(name, task): [] for name in systems for task in tasks}
  for turn in range(args.rounds + 1):
    for task in tasks:
      for name, server in servers.items():
        time.sleep(0.3)  # Idle threads of the one before spin for a while.
        print(task, file=server.stdin, flush=True)
        found[name, task].append(_answer(server, 'result'))
        print(f'round {turn} {task} {name}: '
              f'{found[name, task][-1]["seconds"]:.1f} s', file=sys.stderr)
  for server in servers.values():
    server.stdin.close()
    server.wait()
  rows = [_row(task, systems, found) for task in tasks]
  print('| task | requests | tokens | choices that differ | largest difference'
        ' | seconds, ours | hf (batch) | ratio | CPU seconds, ours | hf | ratio'
        ' |\n' + '| --- ' * 11 + '|')
  for row in rows:
    print('| ' + ' | '.join(str(row[key]) for key in (
        'task', 'requests', 'tokens', 'different_choices'))
          + f' | {row["difference"]:.1e} | {row["ours"]["seconds"]:.1f} |'
          f' {row["hf"]["seconds"]:.1f} ({row["hf_batch"]}) |'
          f' {row["ratio"]:.2f} | {row["ours"]["cpu_seconds"]:.1f} |'
          f' {row["hf"]["cpu_seconds"]:.1f} | {row["cpu_ratio"]:.2f} |')
  return rows


def _answer(server, kind: str) -> dict:
  """The next line of a server that is no log of a library."""
  for line in server.stdout:
    if line.startswith(f'{kind} '):
      return json.loads(line.removeprefix(f'{kind} '))
  raise SystemExit('a process ended; see its messages above')


def _row(task, systems, found) -> dict:
  medians = {name: {clock: statistics.median(
      run[clock] for run in found[name, task][1:])
                    for clock in ('seconds', 'cpu_seconds')}
             for name in systems}
  best = min(systems[1:], key=lambda name: medians[name]['seconds'])
  ours, hf = found['ours', task][-1], found[best, task][-1]
  by_document = {}
  for number, document in enumerate(ours['documents']):
    by_document.setdefault(document, []).append(number)

  def choice(run, numbers):
    return max(numbers, key=lambda number: run['scores'][number][0])

  return {
      'task': task, 'requests': len(ours['scores']), 'tokens': ours['tokens'],
      'difference': max(
          abs(a - b) / max(1, abs(b)) for (a, _), (b, _) in zip(
              ours['scores'], hf['scores'], strict=True)),
      'different_choices': sum(
          choice(ours, numbers) != choice(hf, numbers)
          for numbers in by_document.values()),
      'different_greedy': sum(a != b for (_, a), (_, b) in zip(
          ours['scores'], hf['scores'], strict=True)),
      'documents': len(by_document), 'ours': medians['ours'],
      'hf': medians[best], 'hf_batch': int(best.split()[1]),
      'ratio': medians[best]['seconds'] / medians['ours']['seconds'],
      'cpu_ratio': (medians[best]['cpu_seconds']
                    / medians['ours']['cpu_seconds']),
      'first_seconds': {name: found[name, task][0]['seconds']
                        for name in ('ours', best)},
      'all': {name: [run['seconds'] for run in found[name, task]]
              for name in systems}}


def serve(args) -> None:
  """Answers task after task, named on standard input."""
  from lm_eval.tasks import TaskManager
  manager = TaskManager(include_path=args.include_path, include_defaults=False)
  tasks = manager.load(args.tasks.split(','))['tasks']
  for task in tasks.values():
    task.set_config(key='num_fewshot', value=args.num_fewshot)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=args.limit, rank=0, world_size=1)
  model = _ours(args) if args.serve == 'ours' else _hf(args)
  print('ready {}', flush=True)
  for line in sys.stdin:
    instances = tasks[line.strip()].instances
    before, cpu = time.perf_counter(), time.process_time()
    scores = model().loglikelihood(instances, disable_tqdm=True)
    seconds, cpu = time.perf_counter() - before, time.process_time() - cpu
    asked = model()
    print('result ' + json.dumps({
        'seconds': seconds, 'cpu_seconds': cpu, 'scores': scores,
        'documents': [instance.doc_id for instance in instances],
        'tokens': sum(len(asked.tok_encode(''.join(instance.args)))
                      for instance in instances)}), flush=True)


def _ours(args):
  from recursive_tx import store
  from recursive_tx.config import Run
  from recursive_tx.evaluate import harness_model
  from recursive_tx.evaluate.answers import Answers
  opened = store.open(args.checkpoint)

  def fresh():  # Nothing is answered from what was scored before.
    return harness_model.HarnessModel(
        opened.config, opened.variables, opened.tokenizer, answers=Answers(),
        max_length=2048, run=Run(), exits=False, progress=iter)
  return fresh


def _hf(args):
  os.environ['HF_HUB_OFFLINE'] = '1'
  from lm_eval.models.huggingface import HFLM
  model = HFLM(
      pretrained=args.exported or args.checkpoint, dtype='float32',
      device='cpu', batch_size=int(args.serve.split()[1]), max_length=2048)
  return lambda: model


if __name__ == '__main__':
  main()
