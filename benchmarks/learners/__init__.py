"""How rq4.py learns one task after another."""
