"""The decoder and the parts that it is made of."""

from recursive_tx.model.decoder import Decoder as Decoder
from recursive_tx.model.decoder import abstract_params as abstract_params
from recursive_tx.model.decoder import flat_shapes as flat_shapes
from recursive_tx.model.layer import Layer as Layer
from recursive_tx.model.layer import normalize as normalize
from recursive_tx.model.layer import whole as whole
