"""Whether two checkouts of the package give the same slices, divergences and weights, bit for bit.

    git worktree add /tmp/before HEAD~1
    python benchmarks/same.py /tmp/before .

For whoever changes the structure of the package and nothing of what it computes: five models (an
MLP, a CNN with BatchNorms, ResNet-18, a small ViT, MobileNetV2) are profiled and pruned by θ, by
budgets, with refit and with balance, in a process for each checkout. It exits with 1 and names what
differs; about a minute a checkout.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS: tuple[dict[str, Any], ...] = (
    {"params_budget": 0.6, "round_to": 1},
    {"macs_budget": 0.6, "round_to": 1},
    {"theta": 0.9},
    {"macs_budget": 0.7, "round_to": 1, "fold": "refit"},
    {"macs_budget": 0.7, "round_to": 1, "balance": True},
)


def models() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, model and the shape of one sample."""
    import timm

    torch.manual_seed(0)
    yield "mlp", nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5)), (20,)
    yield (
        "cnn",
        nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3),
            nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 5),
        ),
        (3, 12, 12),
    )  # fmt: skip
    small: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 2}
    for name in ("resnet18", "vit_tiny_patch16_224", "mobilenetv2_050"):
        own = small if name.startswith("vit") else {}
        yield name, timm.create_model(name, num_classes=5, **own), (3, 32, 32)


def results() -> Iterator[tuple[str, Tensor]]:
    """Every tensor that is compared, by name."""
    from nss_prune import NSSPruner, profile

    for name, model, shape in models():
        generator = torch.Generator().manual_seed(1)
        pictures = torch.randn(2, 60, *shape, generator=generator)
        data = [(part, torch.arange(60) % 5) for part in pictures]
        model.eval()
        slices = profile(copy.deepcopy(model), data, progress=False).slice(0.9)
        yield from ((f"{name}/slice/{layer}", kept) for layer, kept in slices.kept.items())
        for arguments in STEPS:
            smaller = copy.deepcopy(model)
            pruner = NSSPruner(smaller, data[0][0][:2], data=data, progress=False, **arguments)
            pruner.step()
            key = f"{name}/{arguments}"
            yield from ((f"{key}/{entry}", value) for entry, value in smaller.state_dict().items())
            found = getattr(getattr(pruner, "evidence", pruner), "eliminations", None) or {}
            yield from ((f"{key}/divergence/{k}", v.divergence) for k, v in found.items())


def results_of(checkout: Path) -> dict[str, Tensor]:
    """The tensors that the package of a checkout gives, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.pt"
        command = [sys.executable, __file__, "--package", str(checkout), "--write", str(path)]
        subprocess.run(command, check=True)
        found: dict[str, Tensor] = torch.load(path)
        return found


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names that one lacks or whose tensors are not equal in every bit; divergences where known."""
    names = [name for name in (*first, *second) if "/divergence/" not in name]
    both = [name for name in first if "/divergence/" in name and name in second]
    return [
        name
        for name in dict.fromkeys([*names, *both])
        if name not in first or name not in second or not torch.equal(first[name], second[name])
    ]


def main() -> int:
    """Compare, and say what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="CHECKOUT")
    parser.add_argument("--package", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write is not None:
        sys.path.insert(0, str(asked.package.resolve()))
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        torch.save(dict(results()), asked.write)
        return 0
    if len(asked.checkouts) != 2:
        parser.error("give two checkouts of the repository")
    first, second = (results_of(checkout) for checkout in asked.checkouts)
    found = differences(first, second)
    print(f"{len(first)} and {len(second)} tensors, {len(found)} differ")
    print(*found[:20], sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
