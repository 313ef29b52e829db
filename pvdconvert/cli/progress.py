"""Progress on stderr: live bars on a terminal, a line every few seconds elsewhere, JSON lines for programs, or nothing.

Never on stdout. A progress report that cannot be written (a closed pipe) must not stop the work, so such errors are
swallowed here.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Any, TextIO

from pvdconvert.cli.options import choice
from pvdconvert.cli.output import clean, duration
from pvdconvert.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import Task, TaskID

MODES = ("auto", "bar", "plain", "json", "none")
PERIOD = 5.0
"""Seconds between two plain lines of one stage."""


def make(mode: str, *, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """The renderer of ``--progress mode``. "auto" draws bars if stderr is a terminal that can."""
    choice("--progress", mode, MODES)
    out = stream or sys.stderr
    if quiet or mode == "none" or out is None:
        return Silent()
    if mode == "json":
        return JsonLines(out)
    if mode == "bar" or (mode == "auto" and out.isatty() and os.environ.get("TERM", "dumb") != "dumb"):
        return Bars(out)
    return Lines(out)


class _Base:
    """What the renderers share: the current stage, its clock, and writing that cannot fail."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._clock = out, clock
        self._name: str | None = None
        self._total: float | None = None
        self._done = 0.0
        self._start = 0.0
        self._metrics: dict[str, float] = {}

    def _begin(self, name: str, total: float | None) -> None:
        self._name, self._total, self._done = name, total, 0.0
        self._start, self._metrics = self._clock(), {}

    def _take(self, done: float, metrics: dict[str, float]) -> None:
        """Note where a stage is; a metric named total corrects the total that was announced."""
        self._done = done
        if "total" in metrics:
            self._total = metrics.pop("total") or None
        self._metrics.update(metrics)

    @property
    def _elapsed(self) -> float:
        return self._clock() - self._start

    @property
    def _eta(self) -> float | None:
        """Seconds left, by the mean speed so far; None if nobody can know."""
        if not self._total or self._done <= 0 or self._done > self._total:
            return None
        return self._elapsed * (self._total - self._done) / self._done

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._out.write(text + "\n")
            self._out.flush()


class Lines(_Base):
    """``[density] 1200/4000 30% psnr 29.4 eta 3m10s`` every few seconds, and each stage's start and end."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic, period: float = PERIOD) -> None:
        super().__init__(out, clock)
        self._period, self._last = period, -math.inf

    def stage(self, name: str, total: float | None = None) -> None:
        if name == self._name:  # announced again: only its total has changed
            self._total = total
            return
        self._end()
        self._begin(name, total)
        self._last = self._clock()
        self._write(f"[{name}] starts")

    def advance(self, done: float, **metrics: float) -> None:
        self._take(done, metrics)
        now = self._clock()
        if self._name is None or now - self._last < self._period:
            return
        self._last = now
        eta = self._eta
        parts = [f"[{self._name}] {count(done, self._total)}", *metric_words(self._metrics)]
        if eta is not None:
            parts.append(f"eta {duration(eta)}")
        self._write(" ".join(parts))

    def note(self, text: str) -> None:
        self._write(f"note: {' '.join(text.split())}")

    def close(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._name is not None:
            words = " ".join([f"[{self._name}] ends after {duration(self._elapsed)}", *metric_words(self._metrics)])
            self._write(words)
            self._name = None


class JsonLines(_Base):
    """One JSON object a line: ``event`` is stage, advance, note or end."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic, period: float = 0.5) -> None:
        super().__init__(out, clock)
        self._period, self._last, self._closed = period, -math.inf, False

    def stage(self, name: str, total: float | None = None) -> None:
        if name == self._name:  # announced again: only its total has changed, and the next "advance" says it
            self._total = total
            return
        self._begin(name, total)
        self._last = -math.inf
        self._send("stage", total=total)

    def advance(self, done: float, **metrics: float) -> None:
        self._take(done, metrics)
        now = self._clock()
        if now - self._last >= self._period or done == self._total:
            self._last = now
            self._send("advance", done=done, total=self._total, eta_s=self._eta, **self._metrics)

    def note(self, text: str) -> None:
        self._send("note", text=text)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._send("end")

    def _send(self, event: str, **values: Any) -> None:
        self._write(json.dumps(clean({"event": event, "stage": self._name, **values}), allow_nan=False))


class Bars(_Base):
    """Rich's live bars: one line a stage, finished stages stay."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(out, clock)
        self._live: RichProgress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str, total: float | None = None) -> None:
        if name == self._name:
            self._total = total
            return
        self._end()
        self._begin(name, total)
        self._task = self._bars().add_task(name, total=total, words="")

    def advance(self, done: float, **metrics: float) -> None:
        self._take(done, metrics)
        if self._task is not None:
            words = " ".join([count(done, self._total, percent=False), *metric_words(self._metrics)])
            self._bars().update(self._task, completed=done, total=self._total, words=words)

    def note(self, text: str) -> None:
        self._bars().console.print(f"note: {' '.join(text.split())}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._end()
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._live.stop()
            self._live = None

    def _end(self) -> None:
        """A stage that ends on a plateau is full, too: its bar stops moving and its clock stops."""
        if self._task is not None and self._live is not None:
            total = self._done if self._done > 0 else 1.0
            self._live.update(self._task, total=total, completed=total)
            self._live.stop_task(self._task)
        self._task, self._name = None, None

    def _bars(self) -> RichProgress:
        if self._live is None:
            from rich.console import Console
            from rich.progress import BarColumn, ProgressColumn, TextColumn
            from rich.progress import Progress as RichProgress
            from rich.text import Text

            class Clock(ProgressColumn):
                """Time left while a stage runs, time taken once it has ended."""

                def render(self, task: Task) -> Text:
                    if task.finished:
                        return Text(duration(task.finished_time or 0.0), style="progress.elapsed")
                    left = task.time_remaining
                    return Text("" if left is None else f"eta {duration(left)}", style="progress.remaining")

            file: IO[str] = self._out
            self._live = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[words]}", markup=False),
                Clock(),
                # The terminal decides here, not FORCE_COLOR: bars are drawn only where a caller asked or a tty is.
                console=Console(file=file, force_terminal=True, no_color=bool(os.environ.get("NO_COLOR")) or None),
                refresh_per_second=4,
            )
            self._live.start()
        return self._live


def count(done: float, total: float | None, *, percent: bool = True) -> str:
    """ "1200/4000 30%", or "1200" where the total is unknown; at most one decimal (a unit may be seconds)."""
    if not total:
        return _short(done)
    share = f" {min(100, int(100 * done / total))}%" if percent else ""
    return f"{_short(done)}/{_short(total)}{share}"


def metric_words(metrics: dict[str, float]) -> list[str]:
    """ "psnr 29.4", "loss 1.2e-03"."""
    words = []
    for name, value in metrics.items():
        if not math.isfinite(value):
            continue
        if name == "psnr":
            text = f"{value:.1f}"
        elif float(value).is_integer() and abs(value) < 1e12:
            text = str(int(value))
        else:
            text = f"{value:.4g}" if 0.01 <= abs(value) < 1e6 else f"{value:.1e}"
        words.append(f"{name} {text}")
    return words


def _short(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.1f}"
