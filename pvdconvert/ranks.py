"""Which process of a group this one is, as torchrun says it in the environment; and who reports a failure. No torch."""

from __future__ import annotations

import importlib
import os

_claimed: bool | None = None


def _number(name: str, least: int) -> int:
    text = os.environ.get(name, "")
    return max(least, int(text)) if text.isdecimal() else least


def size() -> int:
    """Processes that work on one conversion; 1 without torchrun."""
    named = all(os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))
    return _number("WORLD_SIZE", 1) if named else 1


def rank() -> int:
    """This one of them, from 0; that one reports, validates and writes."""
    return _number("RANK", 0) if size() > 1 else 0


def local() -> tuple[int, int]:
    """(number of this process on its machine, processes on this machine)."""
    return (_number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)) if size() > 1 else (0, 1)


def share_threads() -> None:
    """Let the processes of a machine divide its cores where nobody says otherwise (torchrun does, for OpenMP)."""
    among = local()[1]
    if among > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ.setdefault("NUMBA_NUM_THREADS", str(max(1, cores // among)))


def claim() -> bool:
    """Whether a failure of the group is this process's to report: the first that asks, in all of them.

    A failure of one ends the others in their next exchange; what they would say is noise.
    """
    global _claimed
    if _claimed is None:
        _claimed = size() == 1 or _first()
    return _claimed


def intact() -> bool:
    """Whether nothing has failed here."""
    return _claimed is None


def _first() -> bool:
    from datetime import timedelta

    try:
        store_of = importlib.import_module("torch.distributed").TCPStore
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = store_of(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return int(store.add(f"pvdconvert/failed/{attempt}", 1)) == 1
    except Exception:  # nobody to ask: rather twice than not at all
        return True


def prefix() -> str:
    """ "rank 3: " before the error of any process but the first."""
    return f"rank {rank()}: " if rank() > 0 else ""
