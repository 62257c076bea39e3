"""Tables and plots of results as the harness gives them."""

import copy

from recursive_tx.evaluate import task_report

ONE = {'alias': 'piqa', 'acc,none': 0.5, 'acc_stderr,none': 0.25,
       'acc_norm,none': 0.75, 'acc_norm_stderr,none': 'N/A'}
TEXT = {'alias': 'text', 'word_perplexity,none': 123456.5,
        'word_perplexity_stderr,none': 'N/A', 'exact,strict': 0.125}
RESULT = {
    'results': {'piqa': ONE, 'text': TEXT},
    'n-shot': {'piqa': 2, 'text': 0},
    'n-samples': {'piqa': {'original': 99, 'effective': 8},
                  'text': {'original': 3, 'effective': 3}},
    'higher_is_better': {'piqa': {'acc': True, 'acc_norm': True},
                         'text': {'word_perplexity': False}},
    'recursive_tx': {
        'model': {'loops': 2},
        'loops': [{'piqa': {**ONE, 'acc,none': 0.25}, 'text': TEXT},
                  {'piqa': ONE, 'text': TEXT}],
        'control': {
            'results': {'piqa': {**ONE, 'acc,none': 0.375}, 'text': TEXT},
            'n-samples': {'piqa': {'original': 99, 'effective': 4},
                          'text': {'original': 3, 'effective': 3}}}}}


def cells(result):
  head, rule, *lines = task_report.table(result).splitlines()
  assert set(rule) <= set('|- ')
  assert len({len(line) for line in (head, rule, *lines)}) == 1
  return [[cell.strip() for cell in line.strip('|').split('|')]
          for line in (head, *lines)]


def test_a_row_for_each_metric_and_a_column_for_each_loop():
  assert cells(RESULT) == [
      ['task', 'shots', 'documents', 'metric', 'loop 1', 'loop 2',
       'random weights'],
      ['piqa', '2', '8', 'acc ↑', '0.2500 ± 0.2500', '0.5000 ± 0.2500',
       '0.3750 ± 0.2500 (of 4)'],
      ['piqa', '2', '8', 'acc_norm ↑', '0.7500', '0.7500', '0.7500 (of 4)'],
      ['text', '0', '3', 'word_perplexity ↓', '1.235e+05', '1.235e+05',
       '1.235e+05'],
      ['text', '0', '3', 'exact (strict)', '0.1250', '0.1250', '0.1250']]


def test_one_loop_without_a_control():
  result = copy.deepcopy(RESULT)
  del result['recursive_tx']['loops'][0]
  result['recursive_tx']['control'] = None
  assert cells(result)[:2] == [
      ['task', 'shots', 'documents', 'metric', 'score'],
      ['piqa', '2', '8', 'acc ↑', '0.5000 ± 0.2500']]


def test_the_plot_is_a_png(tmp_path):
  for control in (RESULT['recursive_tx']['control'], None):
    result = copy.deepcopy(RESULT)
    result['recursive_tx']['control'] = control
    task_report.plot(result, tmp_path / 'plot')
    assert (tmp_path / 'plot').read_bytes().startswith(b'\x89PNG')


def test_the_plot_draws_the_first_accuracy_of_each_task(tmp_path, monkeypatch):
  from matplotlib.axes import Axes
  drawn, dashed = [], []
  errorbar, axhline = Axes.errorbar, Axes.axhline
  monkeypatch.setattr(Axes, 'errorbar', lambda self, x, y, *rest, **how: (
      drawn.append((list(x), list(y), how['label']))
      or errorbar(self, x, y, *rest, **how)))
  monkeypatch.setattr(Axes, 'axhline', lambda self, y, **how: (
      dashed.append(y) or axhline(self, y, **how)))
  task_report.plot(RESULT, tmp_path / 'plot')
  assert drawn == [([1, 2], [0.25, 0.5], 'piqa (acc)')]
  assert dashed == [0.375]
