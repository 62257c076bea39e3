"""Laws of streamed text: its pieces are the text, whatever the tokens."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
import pytest
import tokenizers

from recursive_tx.text import tokenizer as tokenizer_lib
from recursive_tx.text.stream import TextStream

BROKEN = '\ufffd'


class Pieces:
  """A tokenizer whose ids are any bytes, cut anywhere."""

  def __init__(self, pieces):
    self.pieces = pieces
    self.work = 0

  def decode(self, ids):
    self.work += len(ids)
    return b''.join(self.pieces[i] for i in ids).decode('utf-8', 'replace')


def _stream(tokenizer, prompt, ids, stops=()):
  """(pieces of the stream, whether it stopped)."""
  stream = TextStream(tokenizer, prompt, stops)
  pieces = []
  for i in ids:
    if stream.stopped:
      break
    pieces.append(stream.push(i))
  pieces.append(stream.finish())
  assert stream.length == len(''.join(pieces))
  return pieces, stream.stopped


def _cut(text, stops):
  """Text up to the stop string that is complete first."""
  found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops
           if stop in text]
  return text[:min(found)[1]] if found else text


BYTES = st.one_of(
    st.binary(max_size=4), st.text(max_size=3).map(str.encode),
    st.sampled_from([b'a', b'b', b'ab', b'\xe6', b'\x97', b'\xa5', b'\xf0\x9f',
                     '日'.encode(), BROKEN.encode()]))
STOPS = st.lists(
    st.one_of(st.text(min_size=1, max_size=3),
              st.text('ab日', min_size=1, max_size=4)), max_size=4)


@given(st.lists(BYTES, max_size=12), STOPS)
@example([b'\xe6', b'\x97', b'\xa5'], [])
@example([b'aa', b'ab'], ['aab'])
@example([b'abc'], ['abcd', 'c'])
@example([b'\xff'] * 6, [BROKEN])
@settings(deadline=None, derandomize=True, max_examples=400)
def test_any_bytes_any_stops(pieces, stops):
  tokenizer, ids = Pieces(pieces), range(len(pieces))
  given_, stopped = _stream(tokenizer, [], ids, stops)
  whole = tokenizer.decode(ids)
  assert ''.join(given_) == _cut(whole, stops)
  assert stopped == any(stop in whole for stop in stops)


@given(st.lists(BYTES, max_size=12), st.text(max_size=40), STOPS)
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_prompt_is_not_repeated(pieces, prompt, stops):
  tokenizer = Pieces([*pieces, prompt.encode()])
  given_, _ = _stream(tokenizer, [len(pieces)], range(len(pieces)), stops)
  whole = tokenizer.decode([len(pieces), *range(len(pieces))])
  assert ''.join(given_) == _cut(whole[len(prompt):], stops)


@given(st.text(max_size=12), st.integers(0, 20), st.data())
@settings(deadline=None, derandomize=True, max_examples=200)
def test_nothing_half_is_ever_given(text, where, data):
  """Of a valid text: no half characters, and no half stop that comes."""
  stop = '日<end>'
  whole = text[:where] + stop + text[where:]
  pieces = []
  rest = whole.encode()
  while rest:
    size = data.draw(st.integers(1, 3))
    pieces.append(rest[:size])
    rest = rest[size:]
  seen = ''
  stream = TextStream(Pieces(pieces), [], [stop])
  for i in range(len(pieces)):
    seen += stream.push(i)
    assert BROKEN not in seen or BROKEN in text
    assert text[:where].startswith(seen)
  assert stream.stopped and seen == text[:where]


@given(st.lists(st.sampled_from(
    [b'\xe6', b'\x97', b'\xa5', b'\xff', b'\xf0\x9f', b'', b'a']),
    max_size=20), st.integers(1, 60))
@example([b'\xff'], 60)
@example([b'\xff'], 126)
@example([b'\xe6', b'\x97'], 60)
@example([b''], 60)
@settings(deadline=None, derandomize=True, max_examples=200)
def test_long_runs_that_say_nothing_cost_no_more(pieces, times):
  tokenizer = Pieces([*pieces, *(bytes([b]) for b in '日'.encode())])
  count = len(pieces)
  ids = [*list(range(count)) * times, count, count + 1, count + 2]
  given_, _ = _stream(tokenizer, [], ids)
  assert tokenizer.work < 500 * len(ids) + 100
  assert ''.join(given_) == tokenizer.decode(ids)


def test_what_is_certain_is_given_at_once():
  pieces = ['日'.encode()[:2], '日'.encode()[2:], b'x', b'a', b'c', b'\xff',
            b'\xff', b'\xff', b'\xff', b'y']
  given_, _ = _stream(Pieces(pieces), [], range(len(pieces)), ['abc'])
  assert given_ == ['', '日', 'x', '', 'ac', '', '', '', BROKEN,
                    3 * BROKEN + 'y', '']


def test_a_prompt_may_end_within_a_character():
  for cut in (1, 2):
    one, *rest = '日'.encode()[:cut], *(
        bytes([b]) for b in '日'.encode()[cut:]), b'!'
    tokenizer = Pieces([b'x' + one, *rest])
    assert ''.join(_stream(tokenizer, [0], range(1, len(rest) + 1))[0]) == '日!'


# Real tokenizers.


@pytest.mark.parametrize('kind', ['sentencepiece_dir', 'byte_level_dir'])
def test_real_tokenizers(kind, request):
  """Their leading space, their bytes, their control tokens."""
  tokenizer = tokenizer_lib.load(request.getfixturevalue(kind))

  @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
  @settings(deadline=None, derandomize=True, max_examples=300)
  def ids_law(ids):
    assert ''.join(_stream(tokenizer, [], ids)[0]) == tokenizer.decode(ids)

  @given(st.text(max_size=30), st.text(max_size=30))
  @settings(deadline=None, derandomize=True, max_examples=300)
  def text_law(prompt, text):
    """As if both were one text, though the prompt is only a context."""
    head, tail = tokenizer.encode(prompt), tokenizer.encode(text)
    whole = tokenizer.decode(head + tail)
    assert prompt + ''.join(_stream(tokenizer, head, tail)[0]) == whole

  ids_law()
  text_law()


def test_a_decoder_that_gives_up_whole_runs_of_bytes(tmp_path):
  """Byte fallback of `tokenizers`: one bad byte breaks the good before it."""
  vocab = {f'<0x{i:02X}>': i for i in range(256)} | {'a': 256, '▁': 257}
  model = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab, [], byte_fallback=True))
  model.decoder = tokenizers.decoders.Sequence([
      tokenizers.decoders.Replace('▁', ' '),
      tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
  model.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'config.json').write_text('{"eos_token_id": 0}')
  tokenizer = tokenizer_lib.load(tmp_path)
  day = list('日'.encode())
  assert tokenizer.decode([*day, 0xff]) == 4 * BROKEN

  def text(ids):
    return ''.join(_stream(tokenizer, [], ids)[0])

  assert text([*day, *day, 256]) == '日日a'
  assert text([*day, 0xff, 256]) == '日' + BROKEN + 'a'
  assert text([256, *day[:2]]) == 'a' + 2 * BROKEN
