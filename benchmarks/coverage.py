"""Architectures pruned, from the command line: see benchmarks/architectures/cli.py.

python benchmarks/coverage.py                        all, hours on two cores; goes on if stopped
python benchmarks/coverage.py --models convnext_atto,torchvision:resnet18
python benchmarks/coverage.py --fresh --sides nss_prune
python benchmarks/coverage.py --suite detection
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.architectures.cli import main, parser
from benchmarks.common.options import run

__all__ = ["main", "parser"]

if __name__ == "__main__":
    run(main)
