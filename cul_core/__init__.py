"""Continual unlearning for text-to-image diffusion models; a library that knows nothing of its host."""

__version__ = "0.1.0"

from . import minicanvas as minicanvas  # registers its model family
