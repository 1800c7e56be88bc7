"""The paper's questions in its settings, from the command line: see benchmarks/replication/cli.py.

python benchmarks/paper.py --data DIR --plan                       what would run, and how long
python benchmarks/paper.py --data DIR --device cuda --minutes 13 --resume
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common.options import run
from benchmarks.replication.cli import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    run(main)
