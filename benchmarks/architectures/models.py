"""Models by name, and the smallest of every family of timm and torchvision."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import nn

from benchmarks.architectures import small
from benchmarks.common import provenance
from nss_prune.errors import ArgumentError

SOURCES = ("timm", "torchvision")  # those of which the smallest of every family is tried
SUITES = (*SOURCES, *small.PACKAGES)

# torchvision's names without their sizes: resnet, resnext, wide_resnet, swin, swin_v2, regnet_x ...
ARCHITECTURE = re.compile(r"(wide_)?[a-z]+(_v\d|_[xy](?=_))?")


class Model(NamedTuple):
    """A model by name, in one of the SUITES."""

    source: str
    name: str

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"

    @property
    def family(self) -> str:
        """timm's module, or torchvision's architecture; of a small model its name."""
        if self.source in small.PACKAGES:
            return self.name
        if self.source == "timm":
            return str(timm.model_entrypoint(self.name).__module__.rpartition(".")[2])
        return architecture(self.name)

    def create(self) -> nn.Module:
        """The model with random weights, in evaluation mode."""
        if self.source in small.PACKAGES:
            return small.create(self.source, self.name).eval()
        make = timm.create_model if self.source == "timm" else torchvision.models.get_model
        network: nn.Module = make(self.name)
        return network.eval()


def architecture(name: str) -> str:
    found = ARCHITECTURE.match(name)
    return found.group() if found else name


def model_named(word: str) -> Model:
    """The model meant by "timm:resnet18", "torchvision:resnet18" or "resnet18" (timm's first).

    Raises:
        ArgumentError: There is none.
    """
    source, colon, name = word.rpartition(":")
    known = {"timm": timm.list_models(), "torchvision": torchvision_names()}
    known.update((suite, list(small.names(suite))) for suite in small.PACKAGES)
    for candidate in (source,) if colon else SUITES:
        if name in known.get(candidate, ()):
            return Model(candidate, name)
    raise ArgumentError(f"There is no model {word!r}; use a name of timm, torchvision or a suite.")


def torchvision_names() -> list[str]:
    """torchvision's plain classifiers: no quantized, detection, segmentation or video models."""
    return list(torchvision.models.list_models(module=torchvision.models))


def families(source: str) -> dict[str, list[str]]:
    """Family -> the names of its models."""
    if source in small.PACKAGES:
        return {name: [name] for name in small.names(source)}
    if source == "timm":
        # The test_* models are toys for timm's own tests.
        return {
            module: timm.list_models(module=module, exclude_filters="test_*")
            for module in timm.list_modules()
        }
    found: dict[str, list[str]] = {}
    for name in torchvision_names():
        found.setdefault(architecture(name), []).append(name)
    return found


def smallest(models: Iterable[Model]) -> str | None:
    """The name of the one with the fewest parameters; None where none can be created."""
    sizes = {model.name: size_of(model) for model in models}
    created = {name: size for name, size in sizes.items() if size is not None}
    return min(created, key=lambda name: (created[name], name)) if created else None


def size_of(model: Model) -> int | None:
    """Parameters of a model, without its memory where that works; None where nothing does."""
    for device in ("meta", "cpu"):
        with suppress(Exception), torch.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parameters(model.create())
    return None


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def choose(source: str, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Family -> its smallest model, beside the version of the package that this holds for."""
    version = provenance.version(small.PACKAGES.get(source, source))
    known = earlier["models"] if earlier.get("version") == version else {}
    every = families(source)
    missing = {family: names for family, names in every.items() if known.get(family) is None}
    if missing:
        print(f"choosing the smallest models of {source} {version}: some minutes", flush=True)
    models = dict(known)
    for family, names in missing.items():
        models[family] = smallest(Model(source, name) for name in names)
    return {"version": version, "models": {family: models[family] for family in every}}
