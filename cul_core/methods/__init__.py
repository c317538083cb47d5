"""Forgetting methods; importing this package registers all of them."""

from . import conabl as conabl
from . import esd as esd
from . import exact as exact
from . import sculpmem as sculpmem
from .base import METHODS as METHODS
