"""Neurons that are more than channels: one structure a file."""
