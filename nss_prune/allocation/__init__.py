"""A profile or a measurement, and a target -> a slice."""
