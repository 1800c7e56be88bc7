"""Callbacks for training loops of other libraries, each an extra."""
