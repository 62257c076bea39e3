"""The small model that ships, so that everything runs offline.

The directory is in Hugging Face layout; its README.md says how it was made.
NAME is its path in a clone, and names it from every working directory.
"""

import pathlib

NAME = 'recursive_tx/demo'
DIRECTORY = pathlib.Path(__file__).parent
