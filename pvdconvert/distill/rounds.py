"""Preset best: rounds of new answers and more steps on them, until nothing moves.

A run is bound by how many different points of the surface the student has seen, and by how slowly its rates fall. So
rounds come in cycles: each round adds new answers to those that are held, and the rates fall once over all rounds of a
cycle. On lego, a hash grid, dB on four test views: 33.3 after 1500 steps on 500 k rays, 34.9 after 6000 on a million;
rounds that each replaced the answers and let the rates fall within 4000 steps stayed where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from pvdconvert import stopwatch
from pvdconvert.distill.distiller import Distiller
from pvdconvert.distill.store import Store
from pvdconvert.errors import UsageError
from pvdconvert.field import Stage
from pvdconvert.report import StageReport

LABELS = 0.3
"""Share of a round for asking the teacher."""

RAYS = 0.3
"""Seconds of the last stage, on whole rays, as a share of a round. After a round's single samples it is worth little
(on lego 0.1 dB, or less than nothing), so there is one, and it is taken back where it harms."""

CYCLE = 2
"""Rounds of the first cycle; each later one has twice as many."""

Ask = Callable[[float, int | None, int, Store], tuple[Store, int]]
"""(seconds, batches or None, number of the first batch, what is held) -> the teacher's answers, batches asked."""


def cycles(most: int) -> Iterator[range]:
    """Numbers of the rounds 1 .. ``most`` of each cycle; the last one may be cut short."""
    first, length = 1, CYCLE
    while first <= most:
        yield range(first, min(first + length, most + 1))
        first, length = first + length, 2 * length


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
    """Cycles of at most ``most`` rounds in all while they gain, then whole rays once; reports go to
    ``distiller.reports`` as labels-k, color-k, rays. A round takes ``seconds``; a cycle that gained less than ``gain``
    dB on the quick views is the last, and one that lost is taken back.

    first   number of the first batch of rays that was not asked yet
    fixed   name -> (steps run, planned) of a replay: exactly these, whatever the clock says
    """
    if not most or (fixed is not None and "labels-1" not in fixed):
        return
    for cycle in cycles(most):
        if fixed is not None and f"labels-{cycle[0]}" not in fixed:
            break
        kept = _copy(distiller)
        before = distiller.evaluate()
        for k in cycle:
            first += _round(distiller, ask, first, k, cycle, seconds, fixed)
        if _took_back(distiller, kept, before) or (
            fixed is None and (distiller.reports[-1].psnr_after or 0.0) - before < gain
        ):
            break
    kept = _copy(distiller)
    ran = distiller.again(
        "rays", Stage.RENDER, RAYS * seconds, None if fixed is None else _planned(fixed, "rays"), rates=1 / 3
    )
    _took_back(distiller, kept, ran.psnr_before or 0.0)


def _round(
    distiller: Distiller,
    ask: Ask,
    first: int,
    k: int,
    cycle: range,
    seconds: float,
    fixed: Mapping[str, tuple[int, int]] | None,
) -> int:
    """Round ``k``: more answers, and steps at its part of the cycle's rates. Returns the batches asked."""
    labels, color = f"labels-{k}", f"color-{k}"
    clock = stopwatch.now()
    store, count = ask(LABELS * seconds, None if fixed is None else _planned(fixed, labels)[0], first, distiller.store)
    distiller.renew(store)
    note = f"{count} new batches; {store.rays} rays with {len(store)} samples are held"
    del store
    distiller.reports.append(StageReport(labels, count, count, stopwatch.now() - clock, note=note))
    rest = max(1.0, seconds - (stopwatch.now() - clock))
    part = ((k - cycle[0]) / len(cycle), (k - cycle[0] + 1) / len(cycle))
    distiller.again(color, Stage.COLOR, rest, None if fixed is None else _planned(fixed, color), window=part)
    return count


def _planned(fixed: Mapping[str, tuple[int, int]], name: str) -> tuple[int, int]:
    """What a replay says of a stage of the rounds. Raises UsageError where it stops in the middle of them."""
    if name not in fixed:
        raise UsageError(f"these steps are not a replay: rounds without {name!r}", hint="copy 'replay' from a report")
    return fixed[name]


def _copy(distiller: Distiller) -> list[torch.Tensor]:
    return [p.detach().clone() for p in distiller.student.parameters()]


def _took_back(distiller: Distiller, kept: list[torch.Tensor], before: float) -> bool:
    """Where the quick views are worse than ``before``, the student is what it was."""
    ran = distiller.reports[-1]
    if (ran.psnr_after or 0.0) >= before:
        return False
    with torch.no_grad():
        for p, value in zip(distiller.student.parameters(), kept, strict=True):
            p.copy_(value)
    ran.note, ran.psnr_after = "made it worse and was taken back", before
    return True
