"""Predicted output divergence of every number of removed neurons, for research code."""

from nss_prune.allocation.elimination import Elimination, eliminations

__all__ = ["Elimination", "eliminations"]
