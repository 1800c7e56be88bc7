"""What consumers receive: hooks -> sums."""
