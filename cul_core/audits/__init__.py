"""Audits; importing this package registers all of them."""

from . import changes as changes
from . import classification as classification
from . import from_image as from_image
from . import inversion as inversion
from . import prompt_search as prompt_search
from . import relapse as relapse
from . import residual as residual
from . import resurgence as resurgence
from .base import AUDITS as AUDITS
