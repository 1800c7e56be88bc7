"""How sensitive the outputs are to every layer, and to the size of the model, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nss_prune.allocation.budget import Limits, ShareOf
from nss_prune.allocation.path import Path
from nss_prune.graph.slices import Slice
from nss_prune.pruner.elimination_evidence import EliminationEvidence

SHARES = tuple(step / 10 for step in range(1, 10))
SIZES = 20  # of the curve, besides the whole model
ROWS = 30  # of the table that is printed


@dataclass(frozen=True, repr=False)
class SensitivityTable:
    """Predicted divergence of the outputs, in nats a sample.

    Attributes:
        shares: Of a layer's neurons that go.
        layers: Layer -> divergence after each of these shares of this layer alone.
        cost: What the sizes of the curve are shares of.
        curve: (share of the cost that is kept, divergence) of nested slices, the whole model first.
        together: Whether the curve knows what layers do together; otherwise they are added up.
    """

    shares: tuple[float, ...]
    layers: dict[str, tuple[float, ...]]
    cost: str
    curve: tuple[tuple[float, float], ...]
    together: bool

    @property
    def by_layer(self) -> dict[str, dict[float, float]]:
        """Layer -> share -> divergence."""
        return {
            name: dict(zip(self.shares, values, strict=True))
            for name, values in self.layers.items()
        }

    def to_lists(self) -> dict[str, Any]:
        """The same of dicts, lists and numbers alone, as for JSON."""
        plain = asdict(self)
        plain["shares"] = list(self.shares)
        plain["layers"] = {name: list(values) for name, values in self.layers.items()}
        plain["curve"] = [list(point) for point in self.curve]
        return plain

    def __str__(self) -> str:
        width = max([len("layer"), *(len(name) for name in self.layers)])
        header = "".join(f"{share:>9.0%}" for share in self.shares)
        rows = [
            f"{name:<{width}}" + "".join(f"{value:>9.2g}" for value in values)
            for name, values in self.layers.items()
        ]
        if len(rows) > ROWS:
            rows[ROWS:] = [f"... {len(rows) - ROWS} more layers"]
        points = [f"{share:>7.1%}{value:>10.3g}" for share, value in self.curve]
        added = "" if self.together else ", layers added up"
        return "\n".join(
            [
                "predicted divergence in nats a sample, by the share of a layer's neurons that go",
                f"{'layer':<{width}}{header}",
                *rows,
                f"and by the share of the {self.cost} that is kept{added}",
                *points,
            ]
        )

    def __repr__(self) -> str:
        return f"SensitivityTable({len(self.layers)} layers, {len(self.curve)} sizes)"


def sensitivity_of(
    evidence: EliminationEvidence, chosen: Slice, share: ShareOf, cost: str, limits: Limits
) -> SensitivityTable:
    """The table and the curve.

    Args:
        chosen: The slice whose neurons' costs decide the order of the curve.
        share: What a slice keeps of the cost.
    """
    predictor = evidence.predictor
    layers = {}
    for name in predictor.layers:
        table = predictor.table(name)
        counts = [min(round(part * (len(table) - 1)), len(table) - 2) for part in SHARES]
        layers[name] = tuple(float(table[max(0, count)]) for count in counts)
    path = Path(chosen.groups, evidence.eliminations, share, limits, chosen)
    counts = sorted({round(path.last * step / SIZES) for step in range(SIZES + 1)})
    divergence = path.divergence(predictor, counts).tolist()
    curve = tuple((path.share(count), nats) for count, nats in zip(counts, divergence, strict=True))
    return SensitivityTable(SHARES, layers, cost, curve, predictor.has_cross_terms)
