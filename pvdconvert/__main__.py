"""``python -m pvdconvert``."""

from __future__ import annotations

import sys

from pvdconvert.cli.main import run

if __name__ == "__main__":
    sys.exit(run())
