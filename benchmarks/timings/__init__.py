"""What speed.py times."""
