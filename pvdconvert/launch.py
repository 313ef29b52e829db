"""What must be said before torch is imported, through the environment. No torch.

The command line says it. From Python: ``from pvdconvert import launch; launch.prepare()`` before ``import torch``.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = "1000"
"""Looks, some microseconds in all, before a waiting OpenMP thread sleeps. On two cores, a step of an MLP
student and of a hash grid: 40 and 38 ms where threads sleep at once (waking one is dear on virtual machines), 22 and 34
so; beside another busy process 32 and 50, and 50 and 62 so; 165 and 137 at ten times as many, 500 and 300 by libgomp's
default."""


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Settings for this process and those it starts; what the user has set stays.

    OMP_WAIT_POLICY, GOMP_SPINCOUNT   how long threads that wait keep a core
    THP_MEM_ALLOC_ENABLE              large tensors in huge pages: a page fault for each 2 MB instead of for each 4 KB.
                                      A product of 180 MB took 26 instead of 87 ms, a voxel projection half its time
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ["OMP_WAIT_POLICY"] = "PASSIVE"  # other OpenMP runtimes than libgomp
        environ.setdefault("GOMP_SPINCOUNT", SPINS)
    environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
