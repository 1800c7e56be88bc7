"""What a user should know about a profile."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from nss_prune.core.text import elided
from nss_prune.profiling.categories import IGNORED, MINIMUM_SAMPLES, UNLABELLED


def notes_on_categories(parts: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """What the report says about categories that count as one."""
    together = [part for part in parts if len(part) > 1]
    if not together:
        return ()
    names = "; ".join(
        ", ".join(map(str, part[:8])) + (", ..." if len(part) > 8 else "") for part in together
    )
    return (
        f"categories that had fewer than {MINIMUM_SAMPLES} samples count as one with others: "
        f"{names}",
    )


def notes_on_samples(samples: Mapping[tuple[int, ...], int], used: int, unused: int) -> list[str]:
    """What the report says about samples without a label, and those that are not used.

    Args:
        samples: Categories that count as one -> their samples.
        used: Samples that count for a category.
        unused: Samples that do not.
    """
    notes = []
    for part, count in samples.items():
        if UNLABELLED in part:
            others = [str(category) for category in part if category != UNLABELLED]
            together = f" together with {', '.join(elided(others, 8))}" if others else ""
            notes.append(
                f"samples without a label are category {UNLABELLED}{together}: {count} samples"
            )
    if unused:
        notes.append(
            f"{used} of {used + unused} samples were used, {unused} were not: their label is "
            f"{IGNORED}"
        )
    return notes


def notes_on_drawn(drawn: Mapping[tuple[int, ...], tuple[int, int]]) -> tuple[str, ...]:
    """What the report says about categories of which a part was compared.

    Args:
        drawn: Categories that count as one -> samples compared, and all samples.
    """
    if not drawn:
        return ()
    each = [f"{few} of {all_} of category {part[0]}" for part, (few, all_) in drawn.items()]
    return (
        "'flat' compared a draw of the samples, as memory_limit has no room for all: "
        + ", ".join(elided(each, 8)),
    )


def notes_on_rule(uncovered: Collection[str]) -> tuple[str, ...]:
    """What the report says about functions that DeepLIFT's rule does not cover."""
    if not uncovered:
        return ()
    return (
        "deeplift used the plain gradient of " + ", ".join(sorted(uncovered)) + ": there its "
        "contributions do not add up to the change of the output",
    )
