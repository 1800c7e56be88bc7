"""What IncrementalTrainer was called by, which works for a version longer."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from nss_prune.adaptation.freezing import Freezing
from nss_prune.core.renamed import warn_renamed, with_new_names

ARGUMENTS = {"share": "keep", "weights": "keep_weights"}
"""Old name of an argument -> its name."""


def present_shares(
    given: MutableMapping[str, Any], keep: float | None, keep_weights: float | None
) -> tuple[float | None, float | None]:
    """The shares to keep, by their names or those that keywords have by old ones.

    Raises:
        ArgumentError: Both names of one are given.
    """
    present = {"keep": keep, "keep_weights": keep_weights}
    found = with_new_names(given, ARGUMENTS, present)
    return found["keep"], found["keep_weights"]


class OldNames:
    """Deprecated names of attributes and methods."""

    keep: float | None
    keep_weights: float | None
    finetune_masked: Any
    masked_freezing: Any

    @property
    def share(self) -> float | None:
        """Deprecated name of ``keep``."""
        warn_renamed("share", "keep")
        return self.keep

    @share.setter
    def share(self, value: float | None) -> None:
        warn_renamed("share", "keep")
        self.keep = value

    @property
    def weights(self) -> float | None:
        """Deprecated name of ``keep_weights``."""
        warn_renamed("weights", "keep_weights")
        return self.keep_weights

    @weights.setter
    def weights(self, value: float | None) -> None:
        warn_renamed("weights", "keep_weights")
        self.keep_weights = value

    def settle(self, *arguments: Any, **keywords: Any) -> None:
        """Deprecated name of ``finetune_masked``."""
        warn_renamed("settle()", "finetune_masked()")
        self.finetune_masked(*arguments, **keywords)

    def settling(self, inputs: Any) -> Freezing:
        """Deprecated name of ``masked_freezing``."""
        warn_renamed("settling()", "masked_freezing()")
        freezing: Freezing = self.masked_freezing(inputs)
        return freezing
