"""How OpenMP's threads wait for work. To be said before torch is imported. No torch."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = "1000"
"""Looks, a few microseconds in all, before a waiting thread sleeps. Measured on two cores, a step of an MLP student and
of a hash grid: 40 and 38 ms where threads sleep at once (waking one is dear on a virtual machine), 22 and 34 so; beside
another busy process 32 and 50, and 50 and 62 so; 165 and 137 at ten times as many, 500 and 300 by libgomp's default."""


def briefly(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set it, for this process and those it starts, unless the user has: OMP_WAIT_POLICY, GOMP_SPINCOUNT."""
    if "OMP_WAIT_POLICY" not in environ:
        environ["OMP_WAIT_POLICY"] = "PASSIVE"  # other OpenMP runtimes than libgomp
        environ.setdefault("GOMP_SPINCOUNT", SPINS)
