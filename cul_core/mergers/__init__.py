"""Mergers; importing this package registers all of them."""

from . import task_arithmetic as task_arithmetic
from . import ties as ties
from . import uniform as uniform
from .base import MERGERS as MERGERS
