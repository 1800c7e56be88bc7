"""Architectures pruned by either side, run by coverage.py."""
