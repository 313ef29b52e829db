"""Chained distillation: teacher -> proxy -> student, for teachers so slow that a fast copy answers more.

The proxy stays in memory. The student is measured against the first teacher; what the proxy lost and what the student
lost of the proxy are both reported.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from pvdconvert import stopwatch
from pvdconvert.errors import RequestError, UsageError
from pvdconvert.loading import Loaded
from pvdconvert.plugin import Parts
from pvdconvert.report import Report

if TYPE_CHECKING:
    from pvdconvert.conversion import Conversion
    from pvdconvert.settings import Settings

PROXY_SHARE = 0.5
"""Share of the budget for the proxy."""

SEPARATOR = "|"
"""Between the replays of the two conversions."""


def halves(settings: Settings) -> tuple[Settings, Settings]:
    """The requests (teacher -> proxy, proxy -> student) that ``settings`` with ``via`` stands for.

    Raises UsageError where the request cannot be chained.
    """
    via = settings.via
    assert via is not None
    first, mark, second = (settings.steps or "").partition(SEPARATOR)
    if settings.steps and not mark:
        raise UsageError(f"--replay of a chain has two parts around {SEPARATOR!r}", hint="copy 'replay' from a report")
    # Preset best has no budget: each of the two goes on until nothing moves.
    share = rest = settings.budget
    if not settings.rounds:
        share = settings.seconds * PROXY_SHARE
        rest = settings.seconds - share
    proxy = dataclasses.replace(
        settings, to=via, via=None, sets={}, layout=None, max_mb=None, min_psnr=None, budget=share, steps=first or None
    )
    return proxy, dataclasses.replace(settings, via=None, budget=rest, steps=second or None)


def relay(loaded: Loaded, to_proxy: Conversion, to_student: Conversion, *, validate: bool) -> Report:
    """Run both conversions of a chain; the second one's report, with ``via`` filled.

    Both are checked; the first has no output.
    Raises RequestError where teacher and proxy are of the same architecture.
    """
    via = to_proxy.settings.to
    if loaded.architecture == via:
        raise RequestError(f"--via {via}: the teacher already is of architecture {via!r}", hint="leave --via away")
    first = to_proxy.convert(loaded, dry_run=False, resume=False, validate=validate)
    student, prepared = to_proxy.student, to_proxy.judge
    assert student is not None
    assert prepared is not None
    config = dict(first.target["config"])
    parts = Parts(via, config, {}, loaded.scene, {"chain": first.source, "replay": first.replay})
    proxy = dataclasses.replace(loaded, field=student.eval(), parts=parts, architecture=via)
    to_student.spent = stopwatch.Stopwatch()
    to_student.judge, to_student.resumable = prepared, False
    report = to_student.convert(proxy, dry_run=False, resume=False, validate=validate)
    report.source = {**first.source, "reason": report.source.get("reason", "")}
    report.via = {
        "architecture": via,
        "config": config,
        "seconds": first.seconds,
        "stages": [dataclasses.asdict(s) for s in first.stages],
        "fidelity": first.fidelity,
        "of_proxy": to_student.of_source,
    }
    report.notes = [f"proxy: {n}" for n in first.notes] + report.notes
    report.replay = f"{first.replay}{SEPARATOR}{report.replay}"
    report.seconds += first.seconds
    report.cpu_seconds += first.cpu_seconds
    return report
