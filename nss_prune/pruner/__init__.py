"""NSSPruner and everything around it."""
