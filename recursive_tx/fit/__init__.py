"""A start from data: what kernels see and do, and what is shared for that."""

from recursive_tx.fit.kernels import Kernel as Kernel
from recursive_tx.fit.kernels import energy as energy
from recursive_tx.fit.kernels import path as path
from recursive_tx.fit.kernels import shaped as shaped
from recursive_tx.fit.kernels import virtual as virtual
from recursive_tx.fit.layers import Read as Read
from recursive_tx.fit.moments import Moments as Moments
from recursive_tx.fit.moments import measure as measure
from recursive_tx.fit.start import nearest as nearest
from recursive_tx.fit.tokens import checked as checked
from recursive_tx.fit.tokens import read as read
from recursive_tx.fit.tokens import sample as sample
