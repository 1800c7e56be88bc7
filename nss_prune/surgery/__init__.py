"""A slice -> the smaller model, or the model as it was."""
