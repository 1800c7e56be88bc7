"""Measured output divergence of every number of removed neurons, for research code."""

from nss_prune.allocation.effects import measured

__all__ = ["measured"]
