"""What is on disk, of any kind: outputs, JSON, tensors, paths of trees."""

from recursive_tx.files.json import read_json as read_json
from recursive_tx.files.json import write_json as write_json
from recursive_tx.files.outputs import check_directory as check_directory
from recursive_tx.files.outputs import check_file as check_file
from recursive_tx.files.outputs import check_workdir as check_workdir
from recursive_tx.files.outputs import new_directory as new_directory
from recursive_tx.files.outputs import new_file as new_file
from recursive_tx.files.safetensors import Reader as Reader
from recursive_tx.files.safetensors import Writer as Writer
from recursive_tx.files.safetensors import finite as finite
