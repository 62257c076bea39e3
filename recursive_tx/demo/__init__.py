"""The small model that ships, so that everything runs offline.

The directory is in Hugging Face layout; README.md says how it was made. NAME
is what a clone calls it, and stands for it wherever a program runs.
"""

import pathlib

NAME = 'recursive_tx/demo'
DIRECTORY = pathlib.Path(__file__).parent
