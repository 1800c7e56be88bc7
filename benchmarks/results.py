"""Print the tables of result files as Markdown, each with a line on what produced it.

python benchmarks/results.py benchmarks/results/rq2-mlp-digits.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script imports from the repository, as the tests do
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.common.results import render

if __name__ == "__main__":
    print("\n".join(render(Path(name)) for name in sys.argv[1:]))
