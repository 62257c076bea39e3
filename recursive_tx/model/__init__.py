"""The decoder and the parts that it is made of."""

from recursive_tx.model.decoder import Decoder as Decoder
from recursive_tx.model.decoder import abstract_params as abstract_params
from recursive_tx.model.decoder import flat_shapes as flat_shapes
from recursive_tx.model.layer import Layer as Layer
from recursive_tx.model.layer import normalize as normalize
from recursive_tx.model.linear import project as project
from recursive_tx.model.stack import no_keys as no_keys
from recursive_tx.model.stack import with_keys as with_keys
