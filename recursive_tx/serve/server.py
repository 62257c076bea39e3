"""Runs the service until a signal; then lets running requests finish."""

import asyncio
import contextlib
import signal
import socket

import uvicorn

from recursive_tx.errors import UserError
from recursive_tx.serve.app import Service, make

# For connections to close after the last answer.
_CLOSING_SECONDS = 3


def bind(host: str, port: int) -> socket.socket:
  """A socket for `run`; port 0 is any that is free.

  Raises:
    UserError: the address cannot be used.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
  except (OSError, OverflowError) as error:
    raise UserError(f'cannot listen at {host}:{port} ({error}); choose'
                     ' another --port or --host') from None
  return sock


def run(
    service: Service, sock: socket.socket, *, drain: float, warm_up: int
) -> int:
  """Serves until SIGTERM or SIGINT.

  Args:
    service: its engine may be cold; it is warmed up here.
    sock: of `bind`.
    drain: seconds that running requests may take after the signal; a second
      signal ends them at once.
    warm_up: longest prompt to compile for beforehand, in tokens.

  Returns:
    The exit status: 0, or 1 where the engine failed.
  """
  host, port = sock.getsockname()[:2]
  host = f'[{host}]' if ':' in host else host
  service.worker.warm_up(warm_up)
  return asyncio.run(_run(service, sock, drain, f'http://{host}:{port}'))


async def _run(service: Service, sock, drain: float, url: str) -> int:
  loop, worker = asyncio.get_running_loop(), service.worker
  server = _Server(uvicorn.Config(
      make(service), log_level='warning', access_log=False, lifespan='off',
      ws='none', server_header=False,
      timeout_graceful_shutdown=_CLOSING_SECONDS), url)
  ending = asyncio.Event()

  def end():
    if service.draining:
      server.should_exit = server.force_exit = True
    service.draining = True
    ending.set()

  for number in (signal.SIGTERM, signal.SIGINT):
    loop.add_signal_handler(number, end)
  worker.start(loop)
  watching = asyncio.ensure_future(_watch(service, server, ending, drain))
  try:
    await server.serve([sock])
  finally:
    watching.cancel()
    await asyncio.to_thread(worker.stop)
  return int(worker.failure is not None)


async def _watch(service: Service, server, ending, drain: float) -> None:
  """Ends the server after a signal once nothing runs, or if it failed."""
  while not ending.is_set() and not service.worker.failure:
    with contextlib.suppress(TimeoutError):
      await asyncio.wait_for(ending.wait(), 1)
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(drain):
      while service.worker.live and not service.worker.failure:
        await asyncio.sleep(0.05)
  server.should_exit = True


class _Server(uvicorn.Server):
  """Prints its address when it is up; `_run` handles the signals."""

  def __init__(self, config: uvicorn.Config, url: str):
    super().__init__(config)
    self._url = url

  @contextlib.contextmanager
  def capture_signals(self):
    # Its own would close the sockets at once and end by the signal.
    yield

  async def startup(self, sockets=None) -> None:
    await super().startup(sockets)
    print(f'serving at {self._url}', flush=True)
