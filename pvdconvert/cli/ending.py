"""How the program ends where torchrun has started several of it. No torch."""

from __future__ import annotations

import contextlib
import os
import sys

from pvdconvert import ranks


def leave(code: int) -> None:
    """End this process with ``code`` if it is one of a group; where it is alone nothing happens.

    Not by way of the interpreter's end: a thread of gloo's that is still at work then aborts the process (torch 2.13,
    on a loaded machine, now and then: "terminate called without an active exception").
    """
    if ranks.size() == 1:
        return
    parallel = sys.modules.get("pvdconvert.distill.parallel")
    if parallel is not None:
        parallel.leave()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
