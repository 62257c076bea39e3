"""What a program runs on: mesh, processes, chips, FLOPs."""

from recursive_tx.machine.mesh import AXES as AXES
from recursive_tx.machine.mesh import HEAD_BATCH as HEAD_BATCH
from recursive_tx.machine.mesh import LETTERS as LETTERS
from recursive_tx.machine.mesh import WHOLE as WHOLE
from recursive_tx.machine.mesh import MeshConfig as MeshConfig
from recursive_tx.machine.mesh import Rules as Rules
from recursive_tx.machine.mesh import abstract as abstract
from recursive_tx.machine.mesh import local_rows as local_rows
from recursive_tx.machine.mesh import make_mesh as make_mesh
from recursive_tx.machine.mesh import make_rules as make_rules
from recursive_tx.machine.mesh import mesh_sizes as mesh_sizes
from recursive_tx.machine.mesh import of_boxed as of_boxed
from recursive_tx.machine.mesh import place as place
from recursive_tx.machine.mesh import place_rows as place_rows
from recursive_tx.machine.mesh import replicated as replicated
from recursive_tx.machine.mesh import rows as rows
from recursive_tx.machine.processes import Preemption as Preemption
from recursive_tx.machine.processes import agree as agree
from recursive_tx.machine.processes import initialize as initialize
from recursive_tx.machine.processes import is_main as is_main
from recursive_tx.machine.processes import wait as wait
