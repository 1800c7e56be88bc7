"""The command line ``nss-prune``: one command for each thing that is done with a model."""
