"""Pruned models in folders as timm and the Hugging Face hub have them.

``config.json`` says what it is, ``model.safetensors`` is what :func:`nss_prune.save_pruned` writes,
``README.md`` is a model card.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nss_prune.core.replacing import write_text
from nss_prune.errors import ArgumentError, FileFormatError
from nss_prune.pruner.card import model_card
from nss_prune.pruner.checkpoint import load_pruned, save_pruned
from nss_prune.pruner.report import Report

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

PREPARATION = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""What timm's settings of a model say about how pictures are prepared."""


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    report: Report | None = None,
    name: str | None = None,
) -> None:
    """Write a pruned model as a folder; each file is whole or as it was.

    Args:
        model: The model; it is not changed.
        directory: Made where it is not there.
        report: ``pruner.report``, whose figures the model card shows.
        name: Of the model in its card; the folder's by default.

    Raises:
        ArgumentError: As for :func:`nss_prune.save_pruned`.
        OSError: A file cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(model)
    save_pruned(model, folder / WEIGHTS)
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(folder / CARD, model_card(name or folder.name, config, report))


def from_pretrained(name: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The model of a folder, or of a repository of the hub.

    Args:
        name: A folder that :func:`save_pretrained` wrote; otherwise a repository "owner/name",
            which huggingface_hub downloads.
        model: A fresh model of the structure that was pruned, changed in place. By default timm
            builds the architecture that the file names, and it is in evaluation mode.

    Raises:
        ArgumentError: There is no such folder, and huggingface_hub is not installed.
        FileFormatError, ModelMismatchError: As for :func:`nss_prune.load_pruned`.
        OSError: A file cannot be read.
    """
    folder = Path(name) if Path(name).is_dir() else _downloaded(os.fspath(name))
    config = _read(folder / CONFIG)
    loaded = load_pruned(folder / WEIGHTS, model)
    settings = getattr(loaded, "pretrained_cfg", None)
    saved = config.get("pretrained_cfg")
    if isinstance(settings, dict) and isinstance(saved, Mapping):
        known = {key: saved[key] for key in PREPARATION if key in saved}
        loaded.pretrained_cfg = {  # type: ignore[assignment]
            **settings,
            **{key: tuple(v) if isinstance(v, list) else v for key, v in known.items()},
        }
    return loaded


def push_to_hub(
    model: nn.Module, repository: str, report: Report | None = None, *, private: bool = True
) -> str:
    """Upload a pruned model to the hub, with the login of huggingface_hub.

    Args:
        repository: "owner/name"; made where it is not there.
        report: As of :func:`save_pretrained`.
        private: Whether a new repository is.

    Returns:
        Its address.

    Raises:
        ArgumentError: huggingface_hub is not installed or not logged in, or the model cannot be
            saved.
    """
    hub = _hub()
    if hub.get_token() is None:
        raise ArgumentError("huggingface_hub is not logged in; run: hf auth login")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, report, repository)
        address = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Pruned model")
    return str(address)


def _config(model: nn.Module) -> dict[str, Any]:
    """What timm writes, of a model of timm; otherwise the class's name."""
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    config: dict[str, Any] = {"library": "nss_prune", "class": type(model).__name__}
    if not isinstance(settings, Mapping) or not settings.get("architecture"):
        return config
    config["architecture"] = settings["architecture"]
    for key in ("num_classes", "num_features", "global_pool"):
        if isinstance(getattr(model, key, None), (int, str)):
            config[key] = getattr(model, key)
    config["pretrained_cfg"] = {
        key: settings[key] for key in ("tag", *PREPARATION) if key in settings
    }
    return config


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{os.fspath(path)!r} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{os.fspath(path)!r} is no JSON object; write the folder again")
    return config


def _downloaded(name: str) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise ArgumentError(
            f"there is no folder {name!r}; give one that save_pretrained wrote, or a repository "
            "'owner/name' of the hub"
        )
    return Path(_hub().snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, CARD]))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ArgumentError(
            "this needs huggingface_hub; run: pip install 'nss_prune[hub]'"
        ) from error
    return huggingface_hub
