"""What the zeros are good for: density and bytes of every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from nss_prune.unstructured.weights import Layer, readable_layers

_INDEX_BYTES = 4
_COLUMNS = ("layer", "shape", "density", "dense", "CSR", "bitmap")


@dataclass(frozen=True)
class LayerSparsity:
    """One layer's weight and what it takes to store.

    Attributes:
        name: qualified name of the layer.
        shape: shape of the weight.
        weights: number of weights.
        nonzero: those that are neither masked nor zero.
        dense_bytes: all weights.
        csr_bytes: compressed rows of the weight as `[shape[0], rest]`: the nonzero weights,
            a 4-byte column for each, and a 4-byte start for each row and the end.
        bitmap_bytes: one bit a weight, and the nonzero weights.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    dense_bytes: int
    csr_bytes: int
    bitmap_bytes: int

    @property
    def density(self) -> float:
        """Share of nonzero weights, in [0, 1]; 1 where there are no weights."""
        return self.nonzero / self.weights if self.weights else 1.0


@dataclass(frozen=True)
class SparsityReport:
    """The layers of a model; as text, a table with a line of totals.

    Attributes:
        rows: one a layer, in order.
    """

    rows: tuple[LayerSparsity, ...]

    @property
    def total(self) -> LayerSparsity:
        """All layers as one, named "total", without a shape."""
        rows = self.rows
        return LayerSparsity(
            name="total",
            shape=(),
            weights=sum(row.weights for row in rows),
            nonzero=sum(row.nonzero for row in rows),
            dense_bytes=sum(row.dense_bytes for row in rows),
            csr_bytes=sum(row.csr_bytes for row in rows),
            bitmap_bytes=sum(row.bitmap_bytes for row in rows),
        )

    def __str__(self) -> str:
        lines = [_COLUMNS, *map(_cells, self.rows), _cells(self.total)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if index < 2 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


def sparsity_report(model: nn.Module) -> SparsityReport:
    """Density and bytes of every Linear and convolution weight, shared ones once.

    Args:
        model: any model, its masks permanent or not.
    """
    return SparsityReport(tuple(_row(layer) for layer in readable_layers(model)))


def _row(layer: Layer) -> LayerSparsity:
    nonzero, value_bytes = layer.magnitudes.nonzero, layer.weight.element_size()
    starts = layer.shape[0] + 1
    return LayerSparsity(
        name=layer.name,
        shape=layer.shape,
        weights=layer.size,
        nonzero=nonzero,
        dense_bytes=layer.size * value_bytes,
        csr_bytes=nonzero * (value_bytes + _INDEX_BYTES) + starts * _INDEX_BYTES,
        bitmap_bytes=-(-layer.size // 8) + nonzero * value_bytes,
    )


def _cells(row: LayerSparsity) -> tuple[str, ...]:
    sizes = (row.dense_bytes, row.csr_bytes, row.bitmap_bytes)
    shape = " x ".join(map(str, row.shape))
    return (row.name, shape, f"{row.density:.2%}", *(f"{size:,}" for size in sizes))
