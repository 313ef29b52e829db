"""What the numba twins share: threads, floating point, cells of an axis. Imported only when one of them runs.

Kernels are compiled as serial loops that leave the interpreter's lock, and :func:`share` runs pieces of them on several
threads. That compiles in a third to a seventh of the time of numba's own parallel loops (measured, kernel by kernel),
and no idle thread spins between two kernels.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from numba import njit
from numba.core import event

from pvdconvert import stopwatch

FAST = {"contract", "reassoc", "nsz", "arcp"}
"""Sums may be reordered for vector units; NaN and infinities keep their meaning (they guard the indices)."""


class _Compiling(event.Listener):
    """Tells the budget's clock how long numba compiled. Functions compile one at a time, and those they call within."""

    depth, begin = 0, 0.0

    def on_start(self, _: event.Event) -> None:
        if self.depth == 0:
            self.begin = time.perf_counter()
        self.depth += 1

    def on_end(self, _: event.Event) -> None:
        self.depth -= 1
        if self.depth == 0:
            stopwatch.excuse(time.perf_counter() - self.begin)


event.register("numba:compile", _Compiling())  # type: ignore[no-untyped-call]

_pool: tuple[int, int, ThreadPoolExecutor] | None = None
_lock = threading.Lock()


def threads() -> int:
    """How many threads kernels use: as many as torch does, at most numba's number (by default, the cores)."""
    return max(1, min(torch.get_num_threads(), int(numba.config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]


def _helpers(count: int) -> ThreadPoolExecutor:
    """A pool of ``count`` threads or more; a forked process has none of its parent's threads, so it begins anew."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != os.getpid() or _pool[1] < count:
            _pool = os.getpid(), count, ThreadPoolExecutor(count, thread_name_prefix="pvdconvert-kernel")
        return _pool[2]


def share(kernel: Callable[..., None], count: int, *args: Any, grain: int = 1, uneven: int = 1) -> None:
    """``kernel(begin, end, *args)`` over all of [0, count), in pieces, on :func:`threads` threads.

    ``grain``: the least that is worth waking a thread for. ``uneven``: pieces a thread, where some cost more than
    others; a thread takes the next one when it is done. Pieces are neighbouring ranges and run in any order, so a
    kernel may only write what belongs to its own range.
    """
    workers = min(threads(), count // grain)
    if workers <= 1:
        if count > 0:
            kernel(0, count, *args)
        return
    pieces = min(count, workers * uneven)
    edges = [count * i // pieces for i in range(pieces + 1)]
    turn = itertools.count()

    def work() -> None:
        while (i := next(turn)) < pieces:
            kernel(edges[i], edges[i + 1], *args)

    helpers = [_helpers(workers - 1).submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            helper.result()


@njit(cache=True, nogil=True, fastmath=FAST)
def cell(u: Any, n: Any) -> Any:
    """Lower vertex and fraction of ``u`` in [0, 1] on ``n`` vertices; anything outside (or NaN) is clamped."""
    pos = np.float32(0.0)
    if u > 0.0:
        pos = min(u, np.float32(1.0)) * np.float32(n - 1)
    i = max(min(np.int64(pos), n - 2), 0)
    return i, pos - np.float32(i)
