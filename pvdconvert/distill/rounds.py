"""Preset best: rounds of new answers and more steps on them, until nothing moves.

A run is bound by how many different points of the surface the student has seen, and memory bounds how many answers a
store holds; so each round replaces them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from pvdconvert.distill.distiller import Distiller
from pvdconvert.distill.store import Store
from pvdconvert.field import Stage
from pvdconvert.report import StageReport

LABELS, COLOR = 0.3, 0.6
"""Share of a round for asking the teacher, and share of the rest for the colour stage; whole rays get what is left."""

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
    """At most ``most`` rounds of ``seconds`` while each gains ``gain`` dB on the quick views; reports go to
    ``distiller.reports`` as labels-k, color-k, polish-k.

    first   number of the first batch of rays that was not asked yet
    fixed   name -> (steps run, planned) of a replay: exactly these, whatever the clock says
    """
    for k in range(1, most + 1):
        labels, color, polish = f"labels-{k}", f"color-{k}", f"polish-{k}"
        if fixed is not None and labels not in fixed:
            return
        clock = time.perf_counter()
        store, count = ask(LABELS * seconds, None if fixed is None else fixed[labels][0], first)
        first += count
        distiller.renew(store)
        note = f"{store.rays} new rays with {len(store)} samples"
        del store
        distiller.reports.append(StageReport(labels, count, count, time.perf_counter() - clock, note=note))
        rest = max(1.0, seconds - (time.perf_counter() - clock))
        begin = distiller.polish(color, Stage.COLOR, COLOR * rest, None if fixed is None else fixed[color])
        rest = max(1.0, seconds - (time.perf_counter() - clock))
        end = distiller.polish(polish, Stage.RENDER, rest, None if fixed is None else fixed[polish])
        if fixed is None and (end.psnr_after or 0.0) - (begin.psnr_before or 0.0) < gain:
            return
