"""A model from what the command line says: a name, a function of the user's, or a pruned file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nss_prune.cli.objects import imported, is_object
from nss_prune.errors import ArgumentError, FileFormatError, ModelMismatchError
from nss_prune.pruner.checkpoint import load_pruned


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: A model of timm or torchvision, ``module:function``, or a file of a pruned model.
        weights: A file of weights, safetensors or what ``torch.load`` reads without code.
        by_order: Take the tensors of that file in their order, whatever they are called.
        pretrained: Let timm or torchvision fetch their weights.
        num_classes: Classes of the model; None for its default.
        structure: For a file that names no timm architecture: the model that was pruned.
    """

    name: str
    weights: str | None = None
    by_order: bool = False
    pretrained: bool = False
    num_classes: int | None = None
    structure: str | None = None

    def load(self) -> nn.Module:
        """The model, in evaluation mode.

        Raises:
            ArgumentError, ModelMismatchError, FileFormatError: It cannot be made like this.
            OSError: A file cannot be read.
        """
        if Path(self.name).suffix == ".safetensors":
            model = self._pruned()
        else:
            model = build(self.name, self.num_classes, self.pretrained)
        if self.weights is not None:
            load_weights(model, self.weights, self.by_order)
        return model.eval()

    def _pruned(self) -> nn.Module:
        if self.structure is None:
            return load_pruned(self.name)
        return load_pruned(self.name, build(self.structure, self.num_classes))


def build(name: str, num_classes: int | None = None, pretrained: bool = False) -> nn.Module:
    """A model by its name in timm, or else in torchvision, or by ``module:function``.

    Args:
        num_classes: None for the model's default.
        pretrained: With weights that timm or torchvision fetch.

    Raises:
        ArgumentError: There is no such model.
    """
    own: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if is_object(name):
        model = imported(name)(**own)
        if not isinstance(model, nn.Module):
            raise ArgumentError(
                f"{name} gives a {type(model).__name__}; let it return a torch module"
            )
        return model
    import timm  # here, because it takes seconds

    if timm.is_model(name):
        found: nn.Module = timm.create_model(name, pretrained=pretrained, **own)
        return found
    from torchvision import models

    if name in models.list_models():
        weights = "DEFAULT" if pretrained else None
        found = models.get_model(name, weights=weights, **own)
        return found
    similar = timm.list_models(f"*{name}*")[:5]
    hint = f"; timm has {', '.join(similar)}" if similar else ""
    raise ArgumentError(
        f"there is no model {name!r}{hint}; give a name of timm or torchvision, module:function "
        "for one of your own, or a pruned model's .safetensors file"
    )


def load_weights(model: nn.Module, path: str | os.PathLike[str], by_order: bool = False) -> None:
    """Load a file of weights into a model; no code in it is run.

    Args:
        by_order: Take the tensors in their order, whatever they are called.

    Raises:
        FileFormatError: It is no such file.
        ModelMismatchError: It has other tensors.
        OSError: It cannot be read.
    """
    saved = read_weights(path)
    present = model.state_dict()
    if by_order or saved.keys() != present.keys():
        alike = [tuple(v.shape) for v in saved.values()] == [
            tuple(v.shape) for v in present.values()
        ]
        if not alike or not by_order:
            raise ModelMismatchError(_differing(path, saved, present, alike))
        saved = dict(zip(present, saved.values(), strict=True))
    try:
        model.load_state_dict(saved)
    except RuntimeError as error:
        raise ModelMismatchError(f"{os.fspath(path)!r}: {error}") from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Name -> tensor of a file of weights.

    Raises:
        FileFormatError: It is no such file.
        OSError: It cannot be read.
    """
    try:
        if Path(path).suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise FileFormatError(
            f"{os.fspath(path)!r} holds no plain weights: {error}; give safetensors, or a state "
            "dict that torch.save wrote"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise FileFormatError(f"{os.fspath(path)!r} is no state dict; save model.state_dict()")
    return {name.removeprefix("module."): value for name, value in found.items()}


def _differing(
    path: Any, saved: Mapping[str, Tensor], present: Mapping[str, Tensor], alike: bool
) -> str:
    missing = sorted(present.keys() - saved.keys())
    text = f"{os.fspath(path)!r} lacks {len(missing)} tensors of the model"
    if missing:
        text += f", {missing[0]!r} first"
    if alike:
        return f"{text}, but has all shapes in order: pass --weights-by-order to take them so"
    return f"{text}; give the file of this architecture and number of classes"
