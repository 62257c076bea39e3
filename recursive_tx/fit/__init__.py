"""A start from data: what kernels see and do, and what is shared for that."""

from recursive_tx.fit.choose import divergence as divergence
from recursive_tx.fit.choose import final as final
from recursive_tx.fit.moments import Moments as Moments
from recursive_tx.fit.moments import measure as measure
from recursive_tx.fit.share import share as share
from recursive_tx.fit.tokens import checked as checked
from recursive_tx.fit.tokens import read as read
from recursive_tx.fit.tokens import sample as sample
