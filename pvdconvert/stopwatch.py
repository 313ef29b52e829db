"""The clock that budgets go by: it stands still while kernels are compiled, once for a machine. No torch."""

from __future__ import annotations

import time

_excused = 0.0


def now() -> float:
    """Seconds, from any beginning, without those that :func:`excuse` was told of."""
    return time.perf_counter() - _excused


def excuse(seconds: float) -> None:
    """These seconds, just spent, belong to no budget."""
    global _excused
    _excused += seconds


class Stopwatch:
    """What was spent since it was made."""

    def __init__(self) -> None:
        self._begin, self._excused, self._cpu = time.perf_counter(), _excused, time.process_time()

    def seconds(self) -> float:
        """By the wall clock."""
        return time.perf_counter() - self._begin

    def excused(self) -> float:
        """Seconds of those that belong to no budget."""
        return _excused - self._excused

    def budgeted(self) -> float:
        """Seconds of those that a budget counts."""
        return self.seconds() - self.excused()

    def cpu(self) -> float:
        """CPU seconds of this process, on all its threads."""
        return time.process_time() - self._cpu
