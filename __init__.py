"""Continual unlearning: make text-to-image models forget, request after request, without ruining the rest."""

__version__ = "0.1.0"
