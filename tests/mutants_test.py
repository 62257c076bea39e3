"""The tests notice bugs: one-line mutants of the core, each of them killed.

A mutant is a copy of the package with one text replaced. The tests named in
its row pass on an unchanged copy and must fail on the mutant.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

import recursive_tx

pytestmark = pytest.mark.slow

TESTS = pathlib.Path(__file__).parent
PACKAGE = pathlib.Path(recursive_tx.__file__).parent


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A bug that somebody could write.

  Attributes:
    module: file of the package.
    old, new: text that occurs once, and what takes its place.
    killers: tests of which one at least must fail.
    slow: they are marked so.
  """
  module: str
  old: str
  new: str
  killers: tuple[str, ...]
  slow: bool = False


_SOURCES = ('tying/arithmetic_test.py::'
            'test_average_takes_all_and_lower_the_first')
_STEPWISE = 'tying/arithmetic_test.py::test_stepwise_takes_the_papers_layers'
_SVD = ('tying/arithmetic_test.py::'
        'test_error_is_that_of_the_cut_singular_values')
_LEAVING = 'train/early_test.py::test_what_left_stays_as_it_was'
_MERGE = 'tying/arithmetic_test.py::test_merge_computes_the_same'
_TRIP = 'store/hf_test.py::test_what_is_written_is_read_back'
_EXITS = ('model/decoder_test.py::'
          'test_hidden_is_what_an_exit_after_each_loop_computes')
_STEPS = 'model/kv_cache_test.py::test_step_by_step_equals_the_full_forward'
_FUSED = ('model/kv_cache_test.py::'
           'test_kernels_side_by_side_compute_what_they_do_apart')
_MIXED = 'model/kv_cache_test.py::test_a_pass_over_rows_at_different_loops'
_ALONE = ('engine/engine_test.py::'
          'test_every_request_gets_what_it_would_get_alone')
_LEAVES = 'engine/engine_test.py::test_tokens_exit_by_the_rule'
_NEIGHBOURS = ('engine/engine_test.py::'
               'test_neighbours_and_arrivals_change_nothing')
_PARITY = 'store/families_test.py::test_logits_equal_those_of_transformers'
_SCORED = 'evaluate/loglikelihood_test.py::test_equals_each_request_alone'

MUTANTS = {
    'a_branch_sees_its_neighbours': Mutant(
        'evaluate/loglikelihood.py', 'mask_BTS &= own_BTS |',
        'mask_BTS &= True | own_BTS |', (f'{_SCORED}[llama]',)),
    'a_branch_continues_the_one_before': Mutant(
        'evaluate/shared_rows.py', 'C + np.arange(n)',
        't - begin + np.arange(n)', (f'{_SCORED}[llama]',)),
    'the_window_counts_places_of_the_row': Mutant(
        'evaluate/loglikelihood.py', 'position_BT, position_BT, window',
        'place_1T, place_1T, window', (f'{_SCORED}[mistral]',)),
    'answers_of_another_model': Mutant(
        'evaluate/answers.py', 'digest.update(array.reshape(-1)',
        'len(array.reshape(-1)', (
            'evaluate/answers_test.py::test_the_fingerprint_is_of_the_content',
        )),
    'stepwise_rounds_down': Mutant(
        'tying/arithmetic.py',
        '[[round(place)] for', '[[int(place)] for', (_STEPWISE,)),
    'average_of_neighbours': Mutant(
        'tying/arithmetic.py', '[[loop * M + layer for loop',
        '[[layer * loops + loop for loop', (_SOURCES,)),
    'mean_of_two': Mutant(
        'tying/arithmetic.py', 'total / len(layers)', 'total / 2',
        ('tying/arithmetic_test.py::test_fold_is_the_mean',)),
    'values_on_the_wrong_factor': Mutant(
        'tying/arithmetic.py', 'b[real] = s[real, None] * vectors[:, real].T',
        'b[real] = vectors[:, real].T', (_SVD,)),
    'no_start_without_residual': Mutant(
        'tying/arithmetic.py',
        'a = rng.normal(0, 1 / math.sqrt(rows), (rows, rank))',
        'a = np.zeros((rows, rank))',
        ('tying/arithmetic_test.py::test_no_residual_starts_as_usual',)),
    'norms_of_the_layer_repeated': Mutant(
        'tying/arithmetic.py', 'np.concatenate([v] * cfg.loops)',
        'np.repeat(v, cfg.loops, axis=0)', (_MERGE,)),
    'merge_without_prelude': Mutant(
        'tying/arithmetic.py',
        "middle = 'prelude' in params", 'middle = 0', (_MERGE,)),
    'every_layer_the_first': Mutant(
        'store/hf.py', 'value = source.read(path, layer)',
        'value = source.read(path, 0)', (_TRIP,)),
    'kernel_gradient_of_the_wrong_side': Mutant(
        'model/cpu.py', "->{kernel_letters}', small, large)",
        "->{kernel_letters}', small, 0.5 * large)",
        ('model/cpu_test.py::test_a_product_has_the_gradients_of_einsum',)),
    'fused_part_ignored': Mutant(
        'store/hf.py',
        'return self._fused[1][part]', 'return self._fused[1][0]',
        ('store/hf_test.py::test_leaves_may_be_read_in_any_order',)),
    'parts_of_one_size': Mutant(
        'store/hf.py', 'np.split(array, np.cumsum(sizes)[:-1])',
        'np.split(array, np.arange(1, len(sizes)) * sizes[0] )',
        ('store/families_test.py::test_logits_equal_those_of_transformers'
         '[phi3]',)),
    'long_rope_a_token_early': Mutant(
        'model/layer.py', 'long = cfg.context > cfg',
        'long = cfg.context >= cfg',
        ('store/families_test.py::'
         'test_long_rope_has_other_factors_in_short_contexts',)),
    'sizes_not_compared': Mutant(
        'store/hf.py', 'if found[name] != shape:',
        'if len(found[name]) != len(shape):',
        ('store/hf_test.py::test_a_misshapen_tensor_is_named',)),
    'shards_win': Mutant(
        'files/safetensors.py', 'if whole.exists():',
        'if whole.exists() and not (directory / _INDEX).exists():',
        ('store/hf_test.py::test_a_whole_file_wins_over_shards',)),
    'one_dialect_of_rope': Mutant(
        'store/fields.py', "for key in ('rope_parameters', 'rope_scaling') if",
        "for key in ('rope_parameters',) if",
        ('store/families_test.py::'
         'test_fields_that_contradict_each_other_are_refused',)),
    'any_head_is_tied': Mutant(
        'store/hf.py', 'if self.cfg.tied and head in found and embed in found:',
        'if self.cfg.tied and head in found and embed not in found:',
        ('store/hf_test.py::test_a_tied_heads_copy_is_accepted_if_it_is_one',)),
    'source_overrides_the_model': Mutant(
        'store/hf.py', 'if k not in known}, **written}',
        'if k not in known}, **written, **hf}',
        ('store/hf_test.py::test_a_shorter_model_keeps_what_is_not_used',)),
    'fresh_adapters_add_noise': Mutant(
        'model/adapters.py', "'b': ('R' + outer, rank, initializers.zeros)",
        "'b': ('R' + outer, rank, initializers.normal(std))",
        ('model/adapters_test.py::'
         'test_fresh_adapters_change_nothing_and_differ_by_loop_and_layer',)),
    'loops_drawn_alike': Mutant(
        'model/adapters.py', "split_rngs={'params': True}",
        "split_rngs={'params': False}",
        ('model/adapters_test.py::'
         'test_fresh_adapters_change_nothing_and_differ_by_loop_and_layer',)),
    'biases_of_the_other_part': Mutant(
        'config.py', "if kernel in GROUPS['attn']:",
        "if kernel not in GROUPS['attn']:",
        ('model/adapters_test.py::'
         'test_norms_and_biases_live_in_the_loops_or_in_the_block',)),
    'gemma_starts_at_two': Mutant(
        'model/adapters.py', "initializers.zeros if cfg.norm == 'rms+1' else "
        'initializers.ones', 'initializers.ones',
        ('model/adapters_test.py::test_a_norm_starts_neutral',)),
    'residual_twice': Mutant(
        'model/linear.py', "kernel += jnp.einsum(f'{inner}R", "kernel += 2 * "
        "jnp.einsum(f'{inner}R", (_MERGE,)),
    'thin_residual_twice': Mutant(
        'model/linear.py', 'y += low_rank', 'y += 2 * low_rank',
        ('model/adapters_test.py::'
         'test_a_pair_of_factors_equals_its_product_in_the_kernel',)),
    'segments_forgotten': Mutant(
        'model/layer.py', 'else cfg.window,\n        segment_BT=segment_BT)',
        'else cfg.window)',
        ('model/decoder_test.py::test_packed_documents_equal_separate_ones',)),
    'windows_in_the_other_layers': Mutant(
        'model/layer.py', 'kind == config_lib.WINDOW,',
        'kind != config_lib.WINDOW,',
        (f'{_PARITY}[gemma2]',)),
    'kinds_of_the_physical_layer': Mutant(
        'model/adapters.py', 'first + loop * layers + layer',
        'first + layer', (
            'tying/relax_test.py::test_full_rank_is_exact[gemma3_text]',)),
    'a_cap_without_its_slope': Mutant(
        'model/attention_blocks.py', 'jnp.square(jnp.clip(score / cap, -1, 1))',
        '0.0', ('model/attention_test.py::'
                'test_gradients_equal_those_of_plain[blocks-65-0-0.7]',)),
    'exit_skips_the_coda': Mutant(
        'model/decoder.py', 'self.finish(x_BTD, context)[0] for',
        'normalize(self.cfg, x_BTD, self.norm()) for', (_EXITS,)),
    'left_tokens_go_on_for_a_loop': Mutant(
        'model/layer.py', 'depth_BT <= loop', 'depth_BT < loop', (_LEAVING,)),
    'shared_keys_of_the_loop_before': Mutant(
        'model/layer.py', 'jnp.where(context.first, mine, theirs)',
        'theirs + mine',
        ('model/shared_keys_test.py::test_logits_are_those_made_by_hand',)),
    'shared_keys_overwritten': Mutant(
        'model/decoder.py', 'writes_BT=loop_BT == 0', 'writes_BT=loop_BT >= 0',
        (_MIXED, 'engine/engine_test.py::'
         'test_exits_change_no_later_token_where_loops_share_keys')),
    'leaves_only_above_the_threshold': Mutant(
        'exits/thresholds.py', 'score_E[loop] >= threshold',
        'score_E[loop] > threshold',
        ('exits/thresholds_test.py::'
         'test_tokens_leave_at_the_first_loop_that_lets_them',)),
    'tests_what_it_chose_by': Mutant(
        'exits/calibrate.py', 'tests.append(counted_BT & ~chooses_B1)',
        'tests.append(counted_BT)',
        ('exits/calibrate_test.py::test_the_chosen_thresholds_keep_to_delta',)),
    'left_tokens_judged_by_themselves': Mutant(
        'losses/terms.py', "fixed['final_BT'] *= batch", "batch",
        ('train/early_test.py::'
         'test_a_token_that_left_has_no_final_output_to_compare_with',)),
    'positions_counted_from_the_call': Mutant(
        'model/kv_cache.py', 'slice(None), place.position_BT)',
        'slice(None), place.position_BT * 0)', (_STEPS,)),
    'keys_of_the_first_columns': Mutant(
        'model/linear.py', 'y_BTY[..., -sum(widths):]',
        'y_BTY[..., :sum(widths)]', (_FUSED,)),
    'up_stands_before_the_gate': Mutant(
        'engine/weights.py', "fuse(tree['mlp'], ('gate', 'up'))",
        "fuse(tree['mlp'], ('up', 'gate'))", (_FUSED,)),
    'loops_share_their_keys': Mutant(
        'model/decoder.py', 'cfg.prelude + loop_BT * cfg.layers_per_loop',
        'cfg.prelude + loop_BT * 0', (_STEPS,)),
    'mask_of_the_next_loop': Mutant(
        'model/mixed_loops.py', 'jax.nn.one_hot(loop, cfg.loops)',
        'jax.nn.one_hot((loop + 1) % cfg.loops, cfg.loops)', (_MIXED,)),
    'a_finished_slot_waits': Mutant(
        'engine/step.py', 'position=rows.position.at[at_B].add(1',
        'position=rows.position.at[at_B].add(0', (_ALONE,)),
    'skipped_loops_keep_old_keys': Mutant(
        'engine/step.py', 'jnp.where(loop_CE > exit_C1,',
        'jnp.where(loop_CE > exit_C1 + 1,', (_LEAVES,)),
    'the_neighbours_seed': Mutant(
        'engine/step.py', 'lambda leaf: leaf.at[row_C].get',
        'lambda leaf: leaf.at[index_C].get', (_NEIGHBOURS,)),
    'rotation_is_a_reflection': Mutant(
        'model/layer.py', 'two * cos + one * sin', 'two * cos - one * sin',
        ('model/decoder_test.py::test_only_relative_positions_matter',)),
    'attention_added_twice': Mutant(
        'model/layer.py', '(attn if cfg.parallel else 0)', 'attn', (_PARITY,)),
    'short_wavelengths_stretched': Mutant(
        'model/layer.py', 'frequency *= keep + (1 - keep) / factor',
        'frequency *= keep / factor + (1 - keep)', (_PARITY,)),
    'every_loop_weighs_the_same': Mutant(
        'tying/fit/share.py',
        '[matrices.trace(moment) or 1.0 for moment in outputs]',
        '[1.0 for moment in outputs]',
        ('tying/fit/share_test.py::'
         'test_a_layer_that_does_nothing_to_the_output_weighs_nothing',)),
    'directions_of_no_iteration': Mutant(
        'tying/fit/share.py', 'range(_ITERATIONS)', 'range(0)',
        ('tying/fit/share_test.py::'
         'test_directions_hold_what_the_leading_singular_vectors_do',)),
    'distilled_whatever_comes_of_it': Mutant(
        'tying/fit/search.py', 'if nats_of(made, store) < nats:', 'if True:',
        ('tying/fit/polish_test.py::test_what_it_made_worse_is_not_kept',),
        slow=True),
    'distilled_from_the_normalised': Mutant(
        'tying/fit/polish.py',
        "logits(None, model.normalize(rcfg, x_BTD, fixed['norm']))",
        'logits(None, x_BTD)',
        ('tying/fit/polish_test.py::'
         'test_its_gradient_is_that_of_the_mean_divergence',)),
    'both_take_the_same': Mutant(
        'tying/fit/share.py', 'if bases and len(residuals) == 2:', 'if False:',
        ('tying/fit/share_test.py::'
         'test_two_layers_leave_what_no_two_factors_could_take',)),
    'factors_against_the_shared_kernel': Mutant(
        'tying/fit/share.py', '- applied.T @ applied', '+ applied.T @ applied',
        ('tying/fit/share_test.py::test_neither_side_can_be_bettered_alone',)),
    'moments_by_sequence': Mutant(
        'tying/fit/moments.py',
        '(total) / token_QT.size', '(total) / len(token_QT)',
        ('tying/fit/search_test.py::test_moments_are_means_over_tokens',)),
    'units_of_one_kernel_stay': Mutant(
        'tying/fit/align.py', "if name in ('gate', 'up'):", "if name == 'up':",
        ('tying/fit/align_test.py::test_the_aligned_model_is_the_original',)),
    'more_than_the_budget': Mutant(
        'tying/fit/ranks.py', 'and price[name] <= left', 'and left > 0',
        ('tying/fit/ranks_test.py::'
         'test_the_budget_is_used_and_never_exceeded',)),
    'what_went_astray_stays': Mutant(
        'tying/fit/layers.py', 'attended[0] - attended[1]', '0',
        ('tying/fit/search_test.py::'
         'test_what_the_last_kernel_lacks_is_all_the_layer_lacks',)),
    'norms_of_one_convention': Mutant(
        'tying/fit/refit.py',
        '(base + value) * factor - base', 'value * factor',
        ('tying/fit/search_test.py::'
         'test_norms_do_what_kernels_without_factors_cannot',), slow=True),
    'biases_of_what_should_come_in': Mutant(
        'tying/fit/refit.py', '(sums.mean + sums.shift) @', 'sums.mean @',
        ('tying/fit/search_test.py::test_a_loops_biases_keep_the_means',)),
    'the_start_that_is_farthest': Mutant(
        'tying/fit/search.py',
        'key=lambda row: row[0]', 'key=lambda row: -row[0]',
        ('tying/fit/search_test.py::'
         'test_no_start_of_the_paper_is_nearer_on_what_was_kept_apart',),
        slow=True),
    'keys_of_a_layer_of_the_block': Mutant(
        'store/compact/modeling_recursive.py.txt',
        'RecursiveAttention(config, layer_idx)',
        'RecursiveAttention(config, layer_idx % 3)',
        ('store/compact_test.py::test_generate_as_the_stock_model',)),
    'exported_adapters_of_the_first_loop': Mutant(
        'store/compact.py', "'model.layers.{virtual}', (loop, i))",
        "'model.layers.{virtual}', (0, i))",
        ('store/compact_test.py::test_logits_are_ours',)),
    'heads_that_are_not_permuted': Mutant(
        'store/gguf_tensors.py', 'value.reshape(heads, 2, -1',
        'value.reshape(heads, -1, 2',
        ('store/gguf_form_test.py::'
         'test_heads_are_permuted_as_llama_cpp_does',)),
    'norms_of_gemma_as_they_are': Mutant(
        'store/gguf_tensors.py', "offset = float(cfg.norm == 'rms+1')",
        'offset = 0.0',
        ('store/gguf_form_test.py::'
         'test_norms_of_gemma_are_stored_plus_one',)),
}


def _copy(directory: pathlib.Path) -> None:
  """The package and its tests, so that nothing else is imported."""
  ignore = shutil.ignore_patterns('__pycache__', 'benchmarks')
  shutil.copytree(PACKAGE, directory / 'recursive_tx', ignore=ignore)
  shutil.copytree(TESTS, directory / 'tests', ignore=ignore)
  shutil.copy(TESTS.parent / 'pyproject.toml', directory)


def _run(
    directory: pathlib.Path, killers, slow: bool
) -> subprocess.CompletedProcess:
  nodes = [f'tests/{killer}' for killer in sorted(set(killers))]
  return subprocess.run(
      [sys.executable, '-m', 'pytest', '-x', '-q', '-m',
       'slow' if slow else 'not slow', '-p', 'no:cacheprovider', *nodes],
      cwd=directory, capture_output=True, text=True, timeout=3600,
      env={**os.environ, 'PYTHONPATH': str(directory)})


def _assert_killed(directory: pathlib.Path, name: str) -> None:
  mutant = MUTANTS[name]
  _copy(directory)
  path = directory / 'recursive_tx' / mutant.module
  text = path.read_text()
  assert mutant.killers and mutant.old != mutant.new
  assert text.count(mutant.old) == 1, 'the mutant has drifted from the code'
  path.write_text(text.replace(mutant.old, mutant.new))
  done = _run(directory, mutant.killers, mutant.slow)
  # 1 is failed tests; a mutant that cannot be imported or collected is not
  # a bug that only a test finds.
  assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
  assert 'failed' in done.stdout.splitlines()[-1]


@pytest.mark.parametrize('slow', [False, True])
def test_the_killers_pass_without_a_mutant(slow, tmp_path):
  _copy(tmp_path)
  done = _run(tmp_path, [killer for mutant in MUTANTS.values()
                         if mutant.slow == slow
                         for killer in mutant.killers], slow)
  assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize('name', MUTANTS)
def test_every_mutant_is_killed(name, tmp_path):
  _assert_killed(tmp_path, name)
