"""``python -m pvdconvert``."""

from __future__ import annotations

import sys

from pvdconvert.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
