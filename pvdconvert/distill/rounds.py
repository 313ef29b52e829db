"""Preset best: rounds of new answers and more steps on them, until nothing moves.

A run is bound by how many different points of the surface the student has seen, and memory bounds how many answers a
store holds; so each round replaces them, and the learning rate starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from pvdconvert import stopwatch
from pvdconvert.distill.distiller import Distiller
from pvdconvert.distill.store import Store
from pvdconvert.errors import UsageError
from pvdconvert.field import Stage
from pvdconvert.report import StageReport

LABELS = 0.3
"""Share of a round of plain length for asking the teacher: what memory has to hold."""

RAYS = 0.3
"""Seconds of the last stage, on whole rays, as a share of a round. After a round's single samples it is worth little
(on lego 0.1 dB, or less than nothing), so there is one, and it is taken back where it harms."""

LONGEST = 2
"""How many times as long as a plain one a round may become. Rates start anew with a round and fall within it, so that a
student comes only as far as a round is long: on lego a hash grid had 32.2 dB after 900 steps, and 34.0 after 2700."""

Ask = Callable[[float, int | None, int], tuple[Store, int]]
"""(seconds, batches or None, number of the first batch) -> the teacher's answers, batches asked."""


def rounds(
    distiller: Distiller,
    ask: Ask,
    first: int,
    *,
    most: int,
    seconds: float,
    gain: float,
    fixed: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """At most ``most`` rounds while they gain, then whole rays once; reports go to ``distiller.reports`` as labels-k,
    color-k, rays. A round takes ``seconds``; after one that gained less than ``gain`` dB on the quick views the next
    takes twice as long, up to LONGEST times, and one of those that gains no more is the last.

    first   number of the first batch of rays that was not asked yet
    fixed   name -> (steps run, planned) of a replay: exactly these, whatever the clock says
    """
    if not most or (fixed is not None and "labels-1" not in fixed):
        return
    length = seconds
    for k in range(1, most + 1):
        labels, color = f"labels-{k}", f"color-{k}"
        if fixed is not None and labels not in fixed:
            break
        clock = stopwatch.now()
        store, count = ask(LABELS * seconds, None if fixed is None else _planned(fixed, labels)[0], first)
        first += count
        distiller.renew(store)
        note = f"{store.rays} new rays with {len(store)} samples"
        del store
        distiller.reports.append(StageReport(labels, count, count, stopwatch.now() - clock, note=note))
        rest = max(1.0, length - (stopwatch.now() - clock))
        ran = distiller.again(color, Stage.COLOR, rest, None if fixed is None else _planned(fixed, color))
        if fixed is None and (ran.psnr_after or 0.0) - (ran.psnr_before or 0.0) < gain:
            if length >= LONGEST * seconds:
                break
            length *= 2
    _rays(distiller, RAYS * seconds, None if fixed is None else _planned(fixed, "rays"))


def _planned(fixed: Mapping[str, tuple[int, int]], name: str) -> tuple[int, int]:
    """What a replay says of a stage of the rounds. Raises UsageError where it stops in the middle of them."""
    if name not in fixed:
        raise UsageError(f"these steps are not a replay: rounds without {name!r}", hint="copy 'replay' from a report")
    return fixed[name]


def _rays(distiller: Distiller, seconds: float, fixed: tuple[int, int] | None) -> None:
    """Whole rays at a third of the rates; where that made the quick views worse, the student is what it was."""
    parameters = list(distiller.student.parameters())
    before = [p.detach().clone() for p in parameters]
    ran = distiller.again("rays", Stage.RENDER, seconds, fixed, rates=1 / 3)
    if (ran.psnr_after or 0.0) < (ran.psnr_before or 0.0):
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        ran.note, ran.psnr_after = "made it worse and was taken back", ran.psnr_before
