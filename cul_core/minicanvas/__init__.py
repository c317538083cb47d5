"""MiniCanvas: two tiny trained text-to-image diffusion models, of a small and a large world.

The demo and most tests run on the small one.
"""

from . import family as family
