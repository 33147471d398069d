"""rayexpand: make a labelled image dataset bigger and better with guided diffusion models."""

__version__ = "0.1.0"
