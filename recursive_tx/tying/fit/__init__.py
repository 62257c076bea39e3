"""The initialisation from data: second moments, and what is shared by them."""

from recursive_tx.tying.fit.layers import Read as Read
from recursive_tx.tying.fit.moments import Moments as Moments
from recursive_tx.tying.fit.moments import measure as measure
from recursive_tx.tying.fit.search import nearest as nearest
from recursive_tx.tying.fit.tokens import checked as checked
from recursive_tx.tying.fit.tokens import read as read
from recursive_tx.tying.fit.tokens import sample as sample
from recursive_tx.tying.kernels import Kernel as Kernel
