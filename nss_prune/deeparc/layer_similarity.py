"""How similar layers are: CKA between their outputs, over batches or over all samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nss_prune.core.batches import as_computed, samples_in
from nss_prune.core.hooks import attached
from nss_prune.core.models import evaluation, run, submodule
from nss_prune.deeparc.layers import Layer
from nss_prune.errors import DataError, NumericalError

MINIMUM_SAMPLES = 4
"""The unbiased estimator of HSIC divides by n (n - 3)."""


def unbiased_sums(model: nn.Module, layers: Sequence[Layer], batches: Iterable[Any]) -> Tensor:
    """Σ over the batches of n (n - 3) HSIC_1 of every two layers, float64 ``[layers, layers]``.

    Raises:
        DataError: No batch has the 4 samples that the estimator needs.
    """
    sums = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    seen = False
    for number, inputs in enumerate(batches):
        if samples_in(inputs, number) < MINIMUM_SAMPLES:
            continue
        grams = torch.stack(outputs_seen(model, layers, inputs, number, unbiased_gram))
        sums += (grams @ grams.T).cpu()
        seen = True
    if not seen:
        raise DataError(
            f"no batch has {MINIMUM_SAMPLES} samples, as the unbiased estimator needs; give "
            "larger batches (256 in DeepArc's code), or similarity='paper'"
        )
    return sums


def complete_sums(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Any], memory_limit: int
) -> Tensor:
    """<M, M'> (paper, Eq. 1 and 2) of every two layers over all samples of all batches.

    Every two batches meet. Those whose activations fit into ``memory_limit`` are held while the
    later ones pass by, then the next are held.

    Returns:
        float64 ``[layers, layers]``.
    """
    sums = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    start = 0
    while start < len(batches):
        held: list[list[Tensor]] = []
        room = memory_limit
        for number in range(start, len(batches)):
            found = outputs_seen(model, layers, batches[number], number, Tensor.clone)
            for other in held:
                sums += 2 * _gram_products(found, other)
            room -= sum(values.nbytes for values in found)
            # Once one is left for later, so are all that follow: room only shrinks.
            if number == start or room >= 0:
                sums += _gram_products(found, found)
                held.append(found)
        start += len(held)
    return sums


def _gram_products(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """<A_i B_iᵀ, A_j B_jᵀ> for what layers i and j give for two batches, ``[layers, layers]``."""
    grams = torch.stack([(a @ b.T).double().flatten() for a, b in zip(first, second, strict=True)])
    return (grams @ grams.T).cpu()


def unbiased_gram(values: Tensor) -> Tensor:
    """The Gram matrix, centred so that <K, L> = n (n - 3) HSIC_1 (Székely and Rizzo 2014).

    Args:
        values: ``[samples, features]``, at least 4 samples.

    Returns:
        float64 ``[samples · samples]``.
    """
    # Does not change the result, but keeps digits where the mean is large.
    values = values - values.mean(0)
    gram = (values @ values.T).double().fill_diagonal_(0)
    means = gram.sum(0) / (len(gram) - 2)
    means = means - means.sum() / (2 * (len(gram) - 1))
    return (gram - means[:, None] - means).fill_diagonal_(0).flatten()


def outputs_seen(
    model: nn.Module,
    layers: Sequence[Layer],
    inputs: Any,
    number: int,
    function: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """``function`` of every layer's output ``[samples, features]`` for one batch.

    Raises:
        DataError: The model refuses the batch, or a layer did not run.
        NumericalError: A layer emits NaN or infinite values.
    """
    seen: dict[str, Tensor] = {}
    samples = samples_in(inputs, number)

    def hook(name: str) -> Any:
        # At once: what follows may work in place.
        def see(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            if len(output) != samples:
                raise DataError(
                    f"{name} gives {tuple(output.shape)} for {samples} samples; the first axis "
                    "must hold the samples. Name other layers in layers="
                )
            seen[name] = function(as_computed(output).flatten(1))

        return see

    hooks = [
        (submodule(model, layer.parts[-1]).register_forward_hook, hook(layer.name))
        for layer in layers
    ]
    with evaluation(model), torch.no_grad(), attached(*hooks):
        run(model, inputs, number)
    for layer in layers:
        if layer.name not in seen:
            raise DataError(
                f"{layer.name} does not run on batch {number}; name the layers in layers="
            )
        if not torch.isfinite(seen[layer.name]).all():
            raise NumericalError(
                f"{layer.name} gives NaN or infinite values in batch {number}; check the data and "
                "the model's weights"
            )
    return [seen[layer.name] for layer in layers]


def normalized(sums: Tensor) -> Tensor:
    """CKA from inner products, ``[layers, layers]``, at most 1.

    Two layers that give the same for every sample are similar (1), one of them and any other
    are not (0).
    """
    squares = sums.diagonal()
    norms = torch.outer(squares, squares).sqrt()
    constant = squares == 0
    alike = (constant[:, None] & constant).to(sums.dtype)
    return torch.where(norms > 0, sums / norms, alike).clamp(max=1)
