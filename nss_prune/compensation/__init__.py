"""Correct what is left for what was removed, in closed form or by statistics."""
