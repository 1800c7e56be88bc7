"""A model -> its neurons, as plain data."""
