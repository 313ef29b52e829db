"""Ctrl-C in a long run: first ask it to stop where it can be resumed, then stop at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from pvdconvert.progress import Progress


class Interrupt:
    """Turns SIGINT and SIGTERM into :meth:`stop`, while it is entered.

    A run that never asks :meth:`stop` yet (it is still reading or labelling) has nothing to resume, so the first signal
    ends it; one that asks gets the chance to save itself. The second signal always ends it.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._asked = self._wanted = False
        self._before: dict[signal.Signals, Any] = {}

    def stop(self) -> bool:
        """Whether the run should save itself and end; to be asked after every step."""
        self._asked = True
        return self._wanted

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._before[name] = signal.signal(name, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._wanted or not self._asked:
            raise KeyboardInterrupt
        self._wanted = True
        self._progress.note("stopping as soon as what was done can be kept for --resume; once more stops at once")
