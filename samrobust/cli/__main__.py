"""`python -m samrobust.cli`: the `samrobust` command without its script."""

import sys

from samrobust.cli import main

__all__ = []

if __name__ == "__main__":
    sys.argv[0] = "samrobust"  # results tell the command that they come from
    sys.exit(main())
