"""The card of an exported model: README.md, with what is known of it."""

import pathlib
import re
from typing import Any

from recursive_tx import config as config_lib
from recursive_tx import files
from recursive_tx.store import check
from recursive_tx.store.convert import parameters
from recursive_tx.text.columns import columns

_LOAD = {
    'unrolled': (
        'transformers', 'import transformers\n'
        "model = transformers.AutoModelForCausalLM.from_pretrained('DIR')"),
    'recursive': (
        'transformers', 'import transformers\n'
        'model = transformers.AutoModelForCausalLM.from_pretrained(\n'
        "    'DIR', trust_remote_code=True)\n"
        'tokenizer = transformers.AutoTokenizer.from_pretrained(\n'
        "    'DIR', trust_remote_code=True)\n\n"
        '# Or in vLLM, which serves it with the block held once:\n'
        'import vllm\n'
        "model = vllm.LLM('DIR', trust_remote_code=True,\n"
        "                 model_impl='transformers')"),
    'gguf': (
        'gguf', 'import llama_cpp\n'
        "model = llama_cpp.Llama('DIR/model.gguf')"),
    'nanbeige': (
        'mlx', 'import mlx_lm\n'
        "model, tokenizer = mlx_lm.load('DIR')")}


def write(
    new: pathlib.Path, *, form: str, dtype: str, cfg: config_lib.ModelConfig,
    hf_config: dict[str, Any], report: dict[str, Any] | None,
    found: dict[str, float] | None,
) -> None:
  """Writes README.md; the card that came with the source is kept beside it.

  Args:
    new: the exported directory, but for its card.
    form, dtype: of `export`.
    cfg: what was exported.
    hf_config: config.json of the source.
    report: of `convert`, where there is one.
    found: of `check.difference`, None without a check.
  """
  source = _set_aside(new)
  library, code = _LOAD[form]
  counts = parameters(cfg)
  lines = [
      '---', f'library_name: {library}', 'tags: [recursive_tx]',
      *_license(source), '---', '',
      f'# A {_kind(cfg)}', '',
      f'Exported by recursive_tx as `--form={form}`, {dtype}.', '',
      '## The model', '', _fenced(columns([
          ('field', 'value'),
          ('architecture of the source', _architecture(hf_config)),
          ('loops', str(cfg.loops)),
          ('layers in the block', str(cfg.layers_per_loop)),
          ('prelude, coda', f'{cfg.prelude}, {cfg.coda}'),
          ('layers a token passes', str(cfg.num_layers)),
          ('rank of the adapters', cfg.rank),
          ('norms per loop', str(cfg.has_loop_vectors)),
          *((f'parameters, {part}', f'{count:,}')
            for part, count in counts.items())])), '',
      '## How it was made', '', *_history(report), '',
      '## Checks', '', *_checks(found), '',
      '## How to load it', '', '```python', code, '```', '',
      '## Source and licence', '', *_source(new, source, hf_config)]
  (new / 'README.md').write_text('\n'.join(lines) + '\n', 'utf-8')


def _kind(cfg: config_lib.ModelConfig) -> str:
  if cfg.loops == 1:
    return 'decoder'
  relaxed = any(cfg.ranks.values())
  return ('relaxed ' if relaxed else '') + 'recursive decoder'


def _set_aside(new: pathlib.Path) -> pathlib.Path | None:
  """The source's card under a name of its own; None where it had none."""
  for path in sorted(new.iterdir()):
    if path.name.lower() in ('readme.md', 'readme', 'readme.txt'):
      return path.rename(new / f'SOURCE_{path.name}')
  return None


def _license(source: pathlib.Path | None) -> list[str]:
  """The line of the source's card that names its licence."""
  text = source.read_text('utf-8', 'replace') if source else ''
  front = re.match(r'---\n(.*?)\n---', text, re.S)
  found = re.findall(
      r'^(?:license|license_name|license_link): *[^\n]+$',
      front[1] if front else '', re.M)
  return found


def _architecture(hf_config: dict[str, Any]) -> str:
  named = hf_config.get('architectures') or ['unknown']
  return str(named[0])


def _history(report: dict[str, Any] | None) -> list[str]:
  if report is None:
    return ['The exported directory holds no report of a conversion.']
  return [f'`recursive-tx convert --loops={report["loops"]}'
          f' --rank={report["rank"]} --init={report["init"]}'
          f' --lora={report["lora"]}`, of a model of'
          f' {report["original"]["total"]:,} parameters.']


def _checks(found: dict[str, float] | None) -> list[str]:
  if found is None:
    return ['None was made; `export --check` compares both sides.']
  return [f'Against the model that it was made of, on {found["prompts"]}'
          f' prompts of {found["length"]} random tokens:', '',
          _fenced(check.table(found)), '', 'The same is in `check.json`.']


def _source(new, source, hf_config) -> list[str]:
  name = str(hf_config.get('_name_or_path') or '')
  lines = []
  if name and not name.startswith(('/', '.', '~')):
    lines.append(f'Made from {name}.')
  if source is not None:
    lines.append(f"The source's own card is [{source.name}]({source.name}).")
  terms = [path.name for path in sorted(new.iterdir()) if re.match(
      r'(?i)licen[cs]e|copying|notice|terms', path.name)]
  lines += [f'The terms of the source go with it: {", ".join(terms)}.'
            if terms else 'The source came without a licence file.']
  return lines


def _fenced(text: str) -> str:
  return f'```\n{text}\n```'


def report(directory: pathlib.Path) -> dict[str, Any] | None:
  """The report that `convert` left in a directory, if any."""
  path = directory / 'report.json'
  return files.read_json(path) if path.is_file() else None
