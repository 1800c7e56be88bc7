"""The figures that the paper gives."""
