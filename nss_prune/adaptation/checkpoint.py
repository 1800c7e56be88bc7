"""A checkpoint of a training: model, optimiser and random numbers in one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nss_prune.adaptation.freezing import Freezing
from nss_prune.core.files import read_file, write_file
from nss_prune.core.models import device_of
from nss_prune.core.processes import is_first, wait
from nss_prune.core.undo import put_back, tensors_of
from nss_prune.errors import ModelMismatchError

KIND = "nss_prune training"


Values = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """The file of a training; nothing is written or read without a path.

    Attributes:
        path: Of the file, or None.
        freezing: What trains, of which model.
        optimizer: In use.
        purpose: Distinguishes this training from others of the model; anything JSON can hold.
    """

    path: str | os.PathLike[str] | None
    freezing: Freezing
    optimizer: Optimizer
    purpose: Mapping[str, Any] = field(default_factory=dict)

    def save(self, notes: Mapping[str, Any], best: Mapping[str, Tensor] | None = None) -> None:
        """Write all that the training needs to go on, whole or not at all.

        Of several processes the first writes, the others wait.

        Args:
            notes: Anything that JSON can hold.
            best: Values of the model to keep besides the present ones.

        Raises:
            OSError: The file cannot be written.
        """
        if self.path is None:
            return
        if is_first():
            self._write(self.path, notes, best or {})
        wait()

    def load(self) -> tuple[dict[str, Any], Values | None] | None:
        """Give model, optimiser and random numbers what :meth:`save` wrote.

        Returns:
            The notes and the best values, if any; None where there is no file.

        Raises:
            FileFormatError: The file is damaged, foreign, or of a newer version.
            ModelMismatchError: It is of another model or training, or other entries were frozen;
                nothing is loaded.
            OSError: The file cannot be read.
        """
        if self.path is None or not Path(self.path).exists():
            return None
        tensors, written = read_file(self.path, KIND)
        values = _part(tensors, "model/")
        self._check(written["purpose"], values)
        state = self._optimizer_state(tensors, written)
        self.optimizer.load_state_dict(state)
        put_back(self.freezing.model, values)
        self._set_random(tensors)
        return written["notes"], _part(tensors, "best/") or None

    def _write(
        self,
        path: str | os.PathLike[str],
        notes: Mapping[str, Any],
        best: Mapping[str, Tensor],
    ) -> None:
        model = self.freezing.model
        tensors = {f"model/{name}": value for name, value in tensors_of(model).items()}
        tensors |= {f"best/{name}": value for name, value in best.items()}
        tensors |= self._random()
        state, numbers = self.optimizer.state_dict(), []
        for position, entries in state["state"].items():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{position}/{key}"] = value
                else:
                    numbers.append([position, key, value])
        options = [
            {key: value for key, value in group.items() if isinstance(value, (int, float))}
            for group in state["param_groups"]
        ]
        written = {
            "purpose": dict(self.purpose),
            "notes": dict(notes),
            "state": numbers,
            "options": options,
        }
        write_file(path, KIND, tensors, written)

    def _optimizer_state(
        self, tensors: Mapping[str, Tensor], written: Mapping[str, Any]
    ) -> dict[str, Any]:
        groups = self.optimizer.state_dict()["param_groups"]
        if len(groups) != len(written["options"]):
            raise ModelMismatchError(
                f"{self.path!s} has {len(written['options'])} parameter groups, the optimiser "
                f"{len(groups)}; resume with the optimiser that was used"
            )
        state: dict[int, dict[str, Any]] = {}
        for name, value in _part(tensors, "optimizer/").items():
            position, _, key = name.partition("/")
            state.setdefault(int(position), {})[key] = value
        for position, key, number in written["state"]:
            state.setdefault(position, {})[key] = number
        options = [{**group, **new} for group, new in zip(groups, written["options"], strict=True)]
        return {"state": state, "param_groups": options}

    def _random(self) -> Values:
        states = {"random/cpu": torch.get_rng_state()}
        device = device_of(self.freezing.model)
        if device.type == "cuda":
            states["random/cuda"] = torch.cuda.get_rng_state(device)
        return states

    def _set_random(self, tensors: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(tensors["random/cpu"])
        device = device_of(self.freezing.model)
        if device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"], device)

    def _check(self, purpose: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
        """The purpose and all shapes must agree, and what is frozen must have the same bits."""
        model = self.freezing.model
        if purpose != dict(self.purpose):
            raise ModelMismatchError(
                f"{self.path!s} is the checkpoint of another training: "
                f"{_differences(purpose, self.purpose)}; give another path, or resume=False to "
                "replace it"
            )
        if {name: value.shape for name, value in values.items()} != {
            name: value.shape for name, value in tensors_of(model).items()
        }:
            raise ModelMismatchError(
                f"{self.path!s} is the checkpoint of another model; give another path, or "
                "resume=False to replace it"
            )
        for name, parameter in model.named_parameters():
            trains = self.freezing.trainable.get(
                name, torch.zeros(parameter.shape, dtype=torch.bool)
            )
            differs = parameter.detach().cpu() != values[name]
            if bool((differs & ~trains.cpu()).any()):
                raise ModelMismatchError(
                    f"{self.path!s} differs from the model in frozen entries of {name}; resume "
                    "with the model and slice that the training began with"
                )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In words, where two purposes differ."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    there, here = (
        ", ".join(f"{name} {purpose.get(name)!r}" for name in names) for purpose in (found, wanted)
    )
    return f"it has {there}, this one {here}"


def _part(tensors: Mapping[str, Tensor], prefix: str) -> Values:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
