"""Forgetting methods; importing this package registers all of them."""

from . import conabl as conabl
from . import esd as esd
from . import exact as exact
from . import null_space as null_space
from . import sculpmem as sculpmem
from . import trce_text as trce_text
from . import uce as uce
from .base import METHODS as METHODS
