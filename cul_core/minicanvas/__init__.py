"""MiniCanvas: a tiny trained text-to-image diffusion model of ten objects in 36 styles.

Demo, tests and benchmark run on it.
"""

from . import family as family
