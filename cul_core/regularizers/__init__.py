"""Regularizers; importing this package registers all of them."""

from . import distillation as distillation
from . import projection as projection
from . import selft as selft
from . import weight_anchor as weight_anchor
from .base import REGULARIZERS as REGULARIZERS
