"""What nss_prune is measured against: other criteria for pruning, other ways to keep a task."""
