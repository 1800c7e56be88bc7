"""The accuracy board, from the command line: see benchmarks/board/cli.py.

python benchmarks/accuracy.py                                      a minute, no download
python benchmarks/accuracy.py --settings mlp-mnist,alexnet-cifar10 --data DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.board.cli import main, parser
from benchmarks.common.options import run

__all__ = ["main", "parser"]

if __name__ == "__main__":
    run(main)
