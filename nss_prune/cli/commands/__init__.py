"""One module for each command: ``add`` its options, ``run`` it."""
