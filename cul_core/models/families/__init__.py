"""Model families; importing this package registers all of them."""

from . import flow as flow
from . import sd1 as sd1
from . import sd2 as sd2
from . import sdxl as sdxl
