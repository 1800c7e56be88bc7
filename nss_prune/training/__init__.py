"""The training loop of the package, and what a training is told by its caller."""
