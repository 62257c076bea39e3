"""An HTTP server, compatible with OpenAI's, in front of the engine."""

from recursive_tx.serve.app import Limits as Limits
from recursive_tx.serve.app import Service as Service
from recursive_tx.serve.server import bind as bind
from recursive_tx.serve.server import run as run
from recursive_tx.serve.worker import Worker as Worker
