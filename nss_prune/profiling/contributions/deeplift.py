"""DeepLIFT contribution (Shrikumar et al., ICML 2017), of all layers in one pass.

A batch of N inputs runs together with its references (one where it is the same for all) under
the rescale rule, and the gradient that comes back is the multiplier::

    def collect(reading, gradient):
        metric.gather(difference(reading.activation, samples), gradient[:samples])

    references = count_references(inputs, "zeros")
    watcher = Watcher(groups, samples + references, on_gradient=collect)
    with evaluation(model), watcher.attached(model), RescaleRule(samples, references) as rule:
        outputs = call_model(model, with_reference(inputs, "zeros", references))
        target_scores(outputs, labels, samples, described).backward()

where ``described`` is an :class:`nss_prune.core.outputs.Outputs`. ``rule.uncovered`` then names
what kept its plain gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from nss_prune.core.nested import tensors_in
from nss_prune.core.output_inference import found_in
from nss_prune.core.output_parts import Part
from nss_prune.core.outputs import Outputs, class_scores
from nss_prune.errors import ArgumentError, DataError


class DeepLift:
    """Change of the target's output that a neuron accounts for, against a reference.

    (a − a_ref) · multiplier is summed over all positions and consumers of a sample and averaged
    over the samples. It is signed: a neuron that speaks against the target is below zero (and
    ranked by the magnitude).
    """

    name = "deeplift"
    needs_gradient = True
    needs_reference = True

    def gather(self, activation: Tensor, gradient: Tensor | None) -> Tensor:
        """Sum of difference times multiplier over positions, ``[1, samples, neurons]``.

        Args:
            activation: a − a_ref, ``[samples, neurons, positions]``.
            gradient: The multiplier, of the same shape.
        """
        assert gradient is not None
        return (activation * gradient).sum(2).unsqueeze(0)

    def per_sample(self, gathered: Tensor, positions: int) -> Tensor:
        """The sum itself, ``[1, samples, neurons]``."""
        return gathered.double()

    def score(self, means: Tensor) -> Tensor:
        """The mean, ``[categories, neurons]``."""
        return means[0]


def difference(activation: Tensor, samples: int) -> Tensor:
    """a − a_ref: ``[samples + references, ...]`` -> ``[samples, ...]``."""
    return activation[:samples] - activation[samples:]


def count_references(inputs: Any, baseline: Any = "zeros") -> int:
    """References that a batch needs: 1 where all samples have the same, else one for each.

    Arguments and errors are those of :func:`with_reference`.
    """
    samples = _check_inputs(inputs, baseline)
    shared: list[bool] = []

    def look(tensor: Tensor, reference: Tensor) -> Tensor:
        shared.append(reference.stride(0) == 0)
        return tensor

    _walk(inputs, baseline, samples, look)
    return 1 if all(shared) else samples


def with_reference(inputs: Any, baseline: Any = "zeros", references: int | None = None) -> Any:
    """The inputs of a batch followed by their references, along the first axis.

    Args:
        inputs: A tensor, or a nest of sequences and mappings with tensors in it. Tensors whose
            first axis is not that of the first tensor (a mask for all samples) stay as they are.
        baseline: "zeros", a tensor that broadcasts to one sample or to the batch, or a nest of
            these like ``inputs``. Against "zeros", integer and boolean tensors (a mask) are their
            own reference; token ids need a tensor here.
        references: How many follow: one for each sample by default, or
            :func:`count_references`.

    Raises:
        ArgumentError: A baseline that does not fit, or "zeros" for inputs without real numbers.
        DataError: Inputs without a tensor of samples.
    """
    samples = _check_inputs(inputs, baseline)
    return _walk(
        inputs,
        baseline,
        samples,
        lambda tensor, reference: torch.cat([tensor, reference[:references]]),
    )


def _check_inputs(inputs: Any, baseline: Any) -> int:
    """The number of samples."""
    tensors = tensors_in(inputs)
    if not tensors or tensors[0].dim() == 0:
        raise DataError(
            f"the inputs are a {type(inputs).__name__} without a tensor of samples in the first "
            "place; give the samples along the first axis of a tensor"
        )
    if _is_zeros(baseline) and not any(tensor.is_floating_point() for tensor in tensors):
        raise ArgumentError(
            f"baseline='zeros' for inputs of {tensors[0].dtype}: give the reference as a tensor, "
            "for example the ids of a sequence of padding tokens"
        )
    return len(tensors[0])


def _is_zeros(baseline: Any) -> bool:
    return isinstance(baseline, str) and baseline == "zeros"


def _walk(
    inputs: Any, baseline: Any, samples: int, function: Callable[[Tensor, Tensor], Tensor]
) -> Any:
    """The nest of inputs with ``function`` of every tensor of samples and its references."""
    if isinstance(inputs, Tensor):
        if inputs.dim() == 0 or inputs.shape[0] != samples:
            return inputs
        return function(inputs, _references(inputs, baseline))
    if isinstance(inputs, Mapping):
        parts = _parts(baseline, inputs.keys())
        return {key: _walk(value, parts[key], samples, function) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        parts = _parts(baseline, range(len(inputs)))
        return type(inputs)(
            _walk(value, parts[i], samples, function) for i, value in enumerate(inputs)
        )
    return inputs


def _parts(baseline: Any, keys: Any) -> Mapping[Any, Any]:
    """The baseline of each of several inputs."""
    if _is_zeros(baseline):
        return dict.fromkeys(keys, baseline)
    given: Any = dict(enumerate(baseline)) if isinstance(baseline, (tuple, list)) else baseline
    if not isinstance(given, Mapping) or given.keys() != dict.fromkeys(keys).keys():
        raise ArgumentError(
            f"the model takes the inputs {list(keys)}, the baseline is a "
            f"{type(baseline).__name__}; give one baseline for each input, or 'zeros'"
        )
    return given


def _references(inputs: Tensor, baseline: Any) -> Tensor:
    """The references of a tensor of inputs, expanded to its shape."""
    if _is_zeros(baseline):
        return inputs.new_zeros(()).expand_as(inputs) if inputs.is_floating_point() else inputs
    if not isinstance(baseline, Tensor):
        raise ArgumentError(
            f"baseline is {baseline!r}; use 'zeros', or a tensor that broadcasts to one sample"
        )
    try:
        return baseline.to(inputs).expand_as(inputs)
    except RuntimeError as error:
        raise ArgumentError(
            f"the baseline is {tuple(baseline.shape)}, one sample of the inputs "
            f"{tuple(inputs.shape[1:])}; give a baseline that broadcasts to it"
        ) from error


def target_scores(
    outputs: Any, targets: Any, samples: int, described: Outputs | None = None
) -> Tensor:
    """What is explained: the scores of the target classes, summed over the inputs.

    The references follow the inputs in ``outputs`` and are left out: the gradient of an input's
    own score is its multiplier.

    Args:
        outputs: Of the inputs and references, ``[samples + references, ...]``.
        targets: Class of each sample (and position), ``[samples, ...]``, or zeros and ones of
            the shape of the scores for several classes each; None sums all outputs.
        samples: Number of inputs.
        described: What the outputs mean, see :meth:`nss_prune.core.outputs.Outputs.explained`;
            None for class scores ``[samples + references, classes, ...]``.

    Raises:
        DataError: Targets that are not classes of the output.
    """
    if targets is None:
        return torch.stack([one.tensor[:samples].sum() for one in found_in(outputs)]).sum()
    if described is None:
        size = class_scores(outputs).shape[1]
        described = Outputs((Part(found_in(outputs)[0].path, "classes", axis=1, size=size),))
    return described.explained(outputs, targets, samples)
