"""The command line of a checkout: `python cli.py apply ...` is what an install calls `rewrite apply ...`."""

import sys
from importlib.metadata import entry_points
from importlib.util import find_spec

# without an install the passes are neither importable under their name nor announced
if find_spec("rewrite.passes") is None or not entry_points(group="rewrite.passes"):
    print("rewrite is not installed: run `python -m pip install -e .` in its folder first", file=sys.stderr)
    sys.exit(2)

from rewrite.cli.commands import main

if __name__ == "__main__":
    main()
