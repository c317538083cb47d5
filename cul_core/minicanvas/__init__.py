"""MiniCanvas: a tiny, really trained text-to-image diffusion world of objects in styles, for demo, tests and
benchmark."""

from . import family as family
