"""A task that a model has learned: what it needs from the model, and what it answers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nss_prune.adaptation.task_inference import FEATURES, TaskFeatures, tensors_of_features
from nss_prune.adaptation.task_weights import zeroed
from nss_prune.core.bits import SHAPES, pack, unpack
from nss_prune.core.files import checked_contents, read_file, write_file
from nss_prune.core.hooks import attached
from nss_prune.core.models import flags_kept, submodule
from nss_prune.core.schema import array, check_tensors, record, text, truth, whole
from nss_prune.core.text import elided, shortened
from nss_prune.errors import FileFormatError, ModelMismatchError
from nss_prune.graph.axes import input_axis
from nss_prune.graph.slices import (
    OPTIONAL,
    REQUIRED,
    Slice,
    decode_slice,
    encode_slice,
    tensors_of_slice,
)
from nss_prune.unstructured.storage import shapes

KIND = "nss_prune task"
_NOTES = record(
    {**REQUIRED, "name": text, "classes": array(whole(), least=1), "outputs": whole(1)},
    {**OPTIONAL, "weights": SHAPES, "settled": truth, **FEATURES},
)


@dataclass(frozen=True)
class Task:
    """What a learned task needs from the model: in a few kilobytes, where it keeps all weights.

    Attributes:
        name: Of the task.
        slice: Its critical neurons, those shared with earlier tasks included.
        classes: The outputs it owns, ascending.
        outputs: Rows that the classifier had when it was learned; the first of those it has now.
        weights: Parameter -> True for the weights that it keeps, of the parameter's shape. It
            keeps all of the parameters that are not named.
        finetuned: It was trained alone under its mask, so that it always answers with it.
        features: Where the activations of its neurons lie, by which a sample's task is inferred;
            None where its data was not given.
    """

    name: str
    slice: Slice
    classes: tuple[int, ...]
    outputs: int
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    finetuned: bool = False
    features: TaskFeatures | None = None

    def __repr__(self) -> str:
        classes = ", ".join(elided([*map(str, self.classes)], 10))
        kept = sum(int(weights.sum()) for weights in self.weights.values())
        size = sum(weights.numel() for weights in self.weights.values())
        lines = [f"Task {shortened(self.name, 60)!r} of {len(self.classes)} classes: {classes}"]
        if self.weights:
            lines.append(f"{kept} of {size} weights in {len(self.weights)} parameters")
        return "\n".join([*lines, repr(self.slice)])

    @contextlib.contextmanager
    def masked(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context, its neurons and weights are all that ``model`` has.

        Weights that it does not keep are zero within, and as they were afterwards.

        Raises:
            ModelMismatchError: ``model`` has other layers or widths.
        """
        with self.slice.masked(model), zeroed(model, self.weights):
            yield model

    @contextlib.contextmanager
    def inference(self, model: nn.Module, classifier: str, *, masked: bool) -> Iterator[None]:
        """Within the context, evaluation mode, and −∞ for classes that the task does not own.

        Args:
            classifier: Name of the layer that makes the outputs.
            masked: With its neurons and weights only.

        Raises:
            ModelMismatchError: ``model`` has other layers or widths.
        """
        layer = submodule(model, classifier)
        with flags_kept(model), self.masked(model) if masked else contextlib.nullcontext():
            model.eval()
            with attached((layer.register_forward_hook, self.own_outputs)):
                yield

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the task as safetensors, one bit a neuron or weight, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        tensors, notes = encode_slice(self.slice)
        weights = {f"weights/{name}": bits for name, bits in pack(self.weights).items()}
        notes |= {"name": self.name, "classes": self.classes, "outputs": self.outputs}
        if self.weights:
            notes["weights"] = shapes(self.weights)
        if self.finetuned:
            notes["settled"] = True  # the name in files
        if self.features is not None:
            found, described = self.features.encoded()
            tensors, notes = {**tensors, **found}, {**notes, **described}
        write_file(path, KIND, {**tensors, **weights}, notes)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Task:
        """Read what :meth:`save` wrote.

        Raises:
            FileFormatError: The file is damaged, foreign, or of a newer version.
            OSError: The file cannot be read.
        """
        tensors, notes = read_file(path, KIND, _NOTES)
        classes, sizes = notes["classes"], notes.get("weights", {})
        with checked_contents(path):
            wanted = [
                *tensors_of_slice(notes),
                *(f"weights/{name}" for name in sizes),
                *tensors_of_features(notes),
            ]
            check_tensors(tensors, wanted)
            if classes != sorted(set(classes)) or classes[-1] >= notes["outputs"]:
                raise FileFormatError(f"classes are {classes[:8]} of {notes['outputs']} outputs")
            critical = decode_slice(tensors, notes)
            weights = unpack({name: tensors[f"weights/{name}"] for name in sizes}, sizes)
            features = TaskFeatures.decoded(tensors, notes, critical)
        return Task(
            notes["name"],
            critical,
            tuple(notes["classes"]),
            notes["outputs"],
            weights,
            notes.get("settled", False),
            features,
        )

    def own_outputs(
        self, classifier: nn.Module, arguments: tuple[Any, ...], outputs: Tensor
    ) -> Tensor:
        """A forward hook of the classifier: what the task does not own is −∞.

        A classifier that has grown computes as many outputs as it had when the task was learned:
        with others, the order of its sums, and so the last bits, could be different.

        Raises:
            ModelMismatchError: It has fewer than then.
        """
        axis = input_axis(classifier)
        if outputs.shape[axis] < self.outputs:
            raise ModelMismatchError(
                f"task {shortened(self.name, 60)!r} was learned with {self.outputs} outputs, the "
                f"model has {outputs.shape[axis]}; use the model that learned the task"
            )
        scores = outputs
        if isinstance(classifier, nn.Linear) and classifier.out_features > self.outputs:
            weight, bias = classifier.weight[: self.outputs], classifier.bias
            own = None if bias is None else bias[: self.outputs]
            scores = functional.linear(arguments[0], weight, own)
        classes = torch.tensor(self.classes, device=outputs.device)
        nothing = torch.full_like(outputs, float("-inf"))
        return nothing.index_copy(axis, classes, scores.index_select(axis, classes))
