"""The server's page in a browser: headless Chromium, where there is one."""

import contextlib
import json
import os
import select
import shutil
import subprocess
import time

import pytest
from servers import started

CHROMIUM = shutil.which('chromium')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not CHROMIUM, reason='there is no chromium on PATH')]


class Browser:
  """A page, driven over the pipes of the DevTools protocol."""

  def __init__(self, profile):
    theirs_in, self._to = os.pipe()
    self._from, theirs_out = os.pipe()
    self._process = subprocess.Popen(
        ['bash', '-c', f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', 'bash',
         CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu',
         '--disable-dev-shm-usage', '--remote-debugging-pipe',
         f'--user-data-dir={profile}', 'about:blank'],
        pass_fds=(theirs_in, theirs_out), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(theirs_in)
    os.close(theirs_out)
    self._rest, self._number, self._session = b'', 0, None
    self.said = []  # What the console and the policy complained of.
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call(
        'Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    for domain in ('Page', 'Runtime', 'Log'):
      self.call(f'{domain}.enable')

  def close(self):
    self._process.terminate()
    self._process.wait(30)
    os.close(self._to)
    os.close(self._from)

  def call(self, method, **params):
    """The result of a command."""
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._to, json.dumps(message).encode() + b'\0')
    while True:
      found = self._next()
      if found.get('id') == self._number:
        assert 'error' not in found, found
        return found['result']
      if found.get('method') in ('Runtime.exceptionThrown', 'Log.entryAdded'):
        self.said.append(found['params'])

  def value(self, expression):
    """What an expression gives in the page."""
    found = self.call('Runtime.evaluate', expression=expression,
                      returnByValue=True, awaitPromise=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def until(self, expression, seconds=60):
    end = time.monotonic() + seconds
    while not self.value(expression):
      assert time.monotonic() < end, (expression, self.said)
      time.sleep(0.05)

  def press(self, key, **how):
    for kind in ('keyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=kind, key=key, **how)

  def _next(self):
    while b'\0' not in self._rest:
      assert select.select([self._from], [], [], 60)[0], 'no answer'
      part = os.read(self._from, 2**16)
      assert part, 'the browser ended'
      self._rest += part
    message, self._rest = self._rest.split(b'\0', 1)
    return json.loads(message)


@pytest.fixture(scope='module')
def server(directory):
  with started(directory, '--slots=2') as server:
    yield server


@pytest.fixture
def browser(tmp_path, server):
  with contextlib.closing(Browser(tmp_path)) as browser:
    browser.call('Emulation.setDeviceMetricsOverride', width=360, height=640,
                 deviceScaleFactor=1, mobile=True)
    browser.call('Page.navigate', url=f'http://127.0.0.1:{server.port}/')
    browser.until("document.querySelectorAll('#legend li').length === 3")
    yield browser
    assert not browser.said


def _ask(browser, prompt, most, temperature):
  browser.value('(get("prompt").focus(), get("prompt").select())')
  browser.call('Input.insertText', text=prompt)
  browser.value(f'(get("max_tokens").value = {most},'
                f' get("temperature").value = {temperature})')


def test_tokens_come_coloured_by_their_depth(browser, server):
  _ask(browser, 'the cat', 40, 0)
  # By keys alone; 2 is Control.
  browser.press('Enter', code='Enter', windowsVirtualKeyCode=13, modifiers=2)
  browser.until('get("status").textContent.startsWith("finished")')
  answer = server.client.completions.create(
      model='tiny', prompt='the cat', temperature=0, max_tokens=40).choices[0]
  assert browser.value('get("answer").textContent') == answer.text
  tokens = browser.value(
      '[...document.querySelectorAll("#answer .token")].map(x =>'
      ' [x.dataset.depth, getComputedStyle(x).backgroundColor])')
  legend = browser.value(
      '[...document.querySelectorAll("#legend .token")].map(x =>'
      ' [x.dataset.depth, getComputedStyle(x).backgroundColor])')
  assert len({color for _, color in legend}) == 3
  assert len({depth for depth, _ in tokens}) > 1
  assert {tuple(x) for x in tokens} <= {tuple(x) for x in legend}
  depths = answer.model_extra['depth']
  assert browser.value('get("depth").textContent') == (
      f'{sum(depths) / len(depths):.2f}')
  assert browser.value('get("count").textContent') == '40'
  assert browser.value('+get("rate").textContent') > 0


def test_stopping_frees_the_slot_and_faults_are_shown(browser, server):
  _ask(browser, 'the cat', 9000, 0)
  browser.value('get("go").click()')
  browser.until('+get("count").textContent > 50')
  browser.value('get("stop").click()')
  browser.until('get("status").textContent.startsWith("stopped")')
  end = time.monotonic() + 30
  while server.metric('slots_in_use'):
    assert time.monotonic() < end
  browser.value('get("form").noValidate = true')
  _ask(browser, 'x', 99999, 0)
  browser.value('get("go").click()')
  browser.until('get("error").textContent.includes("99999")')
  # The browser tells of the status 400 itself.
  browser.said = [x for x in browser.said
                  if 'status of 400' not in str(x)]


def test_text_is_never_markup(browser):
  evil = '<img src=x onerror="document.title=1"><b>b</b>'
  browser.value(f'get("answer").append(token({json.dumps(evil)}, 1))')
  assert browser.value('get("answer").textContent') == evil
  assert not browser.value('document.querySelector("#answer img, #answer b")'
                           ' !== null')
  # And the policy keeps out what markup would bring.
  assert browser.value('new Promise(done => { const s ='
                       ' document.createElement("script"); s.textContent ='
                       ' "window.evil = 1"; document.body.append(s);'
                       ' done(window.evil === undefined); })')
  browser.said.clear()


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_readable_on_a_phone_light_and_dark(browser, scheme):
  browser.call('Emulation.setEmulatedMedia', features=[
      {'name': 'prefers-color-scheme', 'value': scheme}])
  assert browser.value('document.documentElement.scrollWidth') <= 360
  # WCAG's contrast of text on each colour of the legend.
  worst = browser.value('''(() => {
    const light = color => {
      const [r, g, b] = color.match(/[\\d.]+/g).map(x => x / 255).map(
        x => x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
      return .2126 * r + .7152 * g + .0722 * b;
    };
    return Math.min(...[...document.querySelectorAll('#legend .token')].map(
      x => { const [a, b] = ['color', 'backgroundColor'].map(
        k => light(getComputedStyle(x)[k]));
        return (Math.max(a, b) + .05) / (Math.min(a, b) + .05); }));
  })()''')
  assert worst >= 4.5
  # Everything that is used has a name.
  unnamed = browser.value(
      '[...document.querySelectorAll("input, textarea, button")].filter(x =>'
      ' !(x.labels && x.labels.length) && !x.textContent.trim()).length')
  assert unnamed == 0
