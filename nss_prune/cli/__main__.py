"""``python -m nss_prune.cli``."""

import sys

from nss_prune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
