"""Every error that nss_prune raises on purpose.

A message says what was given, what is allowed and what to do. Whatever is raised,
the model is as it was before the call.
"""

from __future__ import annotations


class NSSPruneError(Exception):
    """Base of all errors of this package."""


class ArgumentError(NSSPruneError, ValueError):
    """An argument is outside what it may be, for example θ outside (0, 1]."""


class DataError(NSSPruneError, ValueError):
    """The data cannot be used: empty, too few samples, wrong shape, device or labels."""


class NumericalError(NSSPruneError, ArithmeticError):
    """NaN or infinite values where finite ones are needed."""


class NothingToPruneError(NSSPruneError, ValueError):
    """No group of neurons is left to slice or to remove."""


class ModelMismatchError(NSSPruneError, ValueError):
    """A profile, slice or mask was made for another model."""


class GraphError(NSSPruneError, RuntimeError):
    """torch-pruning could not trace the model."""


class RemovalError(NSSPruneError, RuntimeError):
    """The smaller model did not compute what the masked one does; it was put back."""


class FileFormatError(NSSPruneError, ValueError):
    """A file is damaged, foreign, or written by a newer version."""
