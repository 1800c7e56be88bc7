"""Torch tools that know nothing of neurons."""
