"""Forgetting methods; importing this package registers all of them."""

from . import conabl as conabl
from .base import METHODS as METHODS
