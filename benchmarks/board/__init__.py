"""The accuracy board, run by accuracy.py."""
