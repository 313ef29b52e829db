"""Runs one command line of pvdconvert in this process with a profile of each stage:

    python benchmarks/stage_profile.py OUT.json FILE --to X --json --progress none ...

OUT.json: stage -> {"seconds", "native": share of the time in which an operator of torch or a kernel of ours ran, "top":
those with the most time}. Taken by torch's profiler, which sees operators wherever they are called from (Python's own
books ``a * b`` of two tensors to the line that says so); it adds some microseconds to each, so that the rest, Python
around them, looks no smaller than it is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOP = 12
FIRST = "reading"
KERNEL = "kernels"
OPERATORS = ("aten::", "pvdconvert::", KERNEL)
Interval = tuple[int, int, str]
"""Begin and end in nanoseconds, and a name."""


def ran(intervals: list[Interval]) -> dict[str, tuple[int, int]]:
    """name -> (nanoseconds, calls) of the outermost of ``intervals``; time of several threads counts once."""
    found: dict[str, tuple[int, int]] = {}
    until = 0
    for begin, end, name in sorted(intervals):
        if end > until:
            spent, calls = found.get(name, (0, 0))
            found[name] = spent + end - max(begin, until), calls + 1
            until = end
    return found


class Stage:
    """What is known of one stage; it may be entered several times."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.names: dict[str, tuple[int, int]] = {}

    def add(self, seconds: float, names: dict[str, tuple[int, int]]) -> None:
        self.seconds += seconds
        for name, (spent, calls) in names.items():
            before = self.names.get(name, (0, 0))
            self.names[name] = before[0] + spent, before[1] + calls

    def to_json(self) -> dict[str, Any]:
        top = sorted(((spent, calls, name) for name, (spent, calls) in self.names.items()), reverse=True)
        native = sum(spent for spent, _, _ in top) / 1e9
        named = [{"seconds": spent / 1e9, "calls": calls, "function": name} for spent, calls, name in top[:TOP]]
        return {"seconds": self.seconds, "native": native / max(1e-9, self.seconds), "top": named}


class Split:
    """One profile at a time, switched where work says that a stage begins."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self.kept: list[tuple[Stage, float, Any]] = []
        self.close: Callable[[], None] = lambda: None

    def enter(self, name: str) -> None:
        from torch.profiler import ProfilerActivity, profile

        from pvdconvert import stopwatch

        paused = time.perf_counter()
        self.close()
        stage = self.stages.setdefault(name, Stage())
        recorder = profile(activities=[ProfilerActivity.CPU])
        recorder.start()
        begin = time.perf_counter()
        stopwatch.excuse(begin - paused)

        def close() -> None:
            seconds = time.perf_counter() - begin
            recorder.stop()
            self.kept.append((stage, seconds, recorder))

        self.close = close

    def read(self) -> dict[str, Any]:
        """What was recorded; only now, as it takes its time."""
        self.close()
        for stage, seconds, recorder in self.kept:
            events = recorder.profiler.kineto_results.events()
            known = [e for e in events if e.name().startswith(OPERATORS)]
            stage.add(seconds, ran([(e.start_ns(), e.start_ns() + e.duration_ns(), e.name()) for e in known]))
        return {name: stage.to_json() for name, stage in self.stages.items()}


def main() -> int:
    from pvdconvert import launch

    launch.prepare()

    from torch.profiler import record_function

    from pvdconvert.cli.main import run
    from pvdconvert.kernels import cpu
    from pvdconvert.progress import Silent

    share = cpu.share

    def seen(kernel: Callable[..., None], *arguments: Any, **options: Any) -> None:
        with record_function(f"{KERNEL}: {kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"):
            share(kernel, *arguments, **options)

    cpu.share = seen  # before the modules that call it are imported
    split = Split()
    Silent.stage = lambda self, name, total=None: split.enter(name)  # type: ignore[assignment,method-assign]
    split.enter(FIRST)
    code = run(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps(split.read()))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
