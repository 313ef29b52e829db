"""Runs one command line of pvdconvert in this process with a profile of each stage:

    python benchmarks/stage_profile.py OUT.json FILE --to X --json --progress none ...

OUT.json: stage -> {"seconds", "native": share in kernels, "top": functions with the most time of their own}. What
cProfile books to built-in functions (torch's operators) and to the files of ``kernels/`` is time in kernels and GEMMs;
the rest is Python around them, and cProfile makes that part look larger than it is.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import sys
from pathlib import Path
from typing import Any

TOP = 12
FIRST = "reading"
IMPORTS = ("<built-in method marshal.loads>", "<built-in method _imp.create_dynamic>")
Functions = dict[tuple[str, int, str], tuple[Any, ...]]


def functions(profile: cProfile.Profile) -> Functions:
    found: Functions = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return found


def shares(stats: Functions) -> dict[str, Any]:
    """Seconds without imports, the share of them in kernels, and the functions with the most time of their own."""
    native, total, top = 0.0, 0.0, []
    for (file, _, name), (_, calls, own, _, _) in stats.items():
        if "importlib" in file or name in IMPORTS:
            continue
        total += own
        native += own if file == "~" or "/kernels/" in file else 0.0
        top.append((own, calls, name if file == "~" else f"{Path(file).parent.name}/{Path(file).name}:{name}"))
    top.sort(reverse=True)
    named = [{"seconds": own, "calls": calls, "function": place} for own, calls, place in top[:TOP]]
    return {"seconds": total, "native": native / max(1e-9, total), "top": named}


class Split:
    """One profile a stage, switched where work says that a stage begins."""

    def __init__(self) -> None:
        self.profiles: dict[str, cProfile.Profile] = {}
        self.now: cProfile.Profile | None = None

    def enter(self, name: str) -> None:
        if self.now is not None:
            self.now.disable()
        self.now = self.profiles.setdefault(name, cProfile.Profile())
        self.now.enable()


def main() -> int:
    from pvdconvert.cli.main import run
    from pvdconvert.progress import Silent

    split = Split()
    Silent.stage = lambda self, name, total=None: split.enter(name)  # type: ignore[assignment,method-assign]
    split.enter(FIRST)
    code = run(sys.argv[2:])
    assert split.now is not None
    split.now.disable()
    found = {name: shares(functions(profile)) for name, profile in split.profiles.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
