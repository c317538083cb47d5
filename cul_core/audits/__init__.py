"""Audits; importing this package registers all of them."""

from . import classification as classification
from .base import AUDITS as AUDITS
