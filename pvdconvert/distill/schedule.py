"""How long each stage may take, how the learning rate falls, and when a stage has nothing left to give."""

from __future__ import annotations

import dataclasses
import math

from pvdconvert.errors import UsageError
from pvdconvert.field import Stage

SHARES = {Stage.FEATURES: 0.02, Stage.DENSITY: 0.05, Stage.COLOR: 0.83, Stage.RENDER: 0.10}
"""Share of the distillation budget that each stage may use. What an early stage leaves goes to the later ones.

Measured on lego with as many steps in all, dB on four test views, where density, color and render have 10, 48, 40 %
(6, 82, 10; 2, 96, 0): hash grid 32.06 (32.71; 32.55), planes 32.73 (33.15; 33.22), MLP 28.91 (29.68; not tried)."""

WARMUP = 12
"""Steps of rising rate at the start of a stage; they also measure what a step costs."""

FINAL = 0.02
"""The learning rate at the end, as a share of its peak."""

PATIENCE = {Stage.DENSITY: 0.02}
"""A stage ends when a fifth of its steps improve the held-out loss by less than this share. Not colour: its rates fall
within it, and what looks like a plateau at a high rate is none (on lego, stopped at 2200 of 4500 steps, a hash grid had
34.9 dB instead of 36.1)."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """Steps that reproduce a run bit for bit: ``scout=3;labels=12;density=90/120;...``.

    Batches of rays while scouting and after, then for each stage the steps run / the steps planned.
    """

    scout: int
    labels: int
    stages: tuple[tuple[str, int, int], ...]

    def __str__(self) -> str:
        stages = (f"{name}={run}/{planned}" for name, run, planned in self.stages)
        return ";".join([f"scout={self.scout}", f"labels={self.labels}", *stages])

    @classmethod
    def parse(cls, text: str) -> Replay:
        """Raises UsageError where ``text`` is not what a report's ``replay`` says."""
        try:
            scout, labels, stages = 1, 0, []
            for part in text.split(";"):
                name, _, value = part.partition("=")
                if name == "labels":
                    labels = int(value)
                elif name == "scout":
                    scout = int(value)
                else:
                    run, _, planned = value.partition("/")
                    stages.append((name, int(run), int(planned or run)))
                    if stages[-1][1] < 0 or stages[-1][2] < stages[-1][1]:
                        raise ValueError(part)
            if labels < 1 or scout < 1:
                raise ValueError("labels")
        except ValueError as error:
            raise UsageError(f"steps {text!r} are not a replay: {error}", hint="copy 'replay' from a report") from error
        return cls(scout, labels, tuple(stages))


def rate(progress: float, step: int) -> float:
    """The learning rate's factor at ``progress`` in [0, 1] of the whole distillation, ``step`` of the stage."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return (FINAL + (1.0 - FINAL) * cosine) * min(1.0, (step + 1) / WARMUP)


class Plateau:
    """Watches a held-out loss; says when it has stopped falling."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.last: float | None = None

    def reached(self, loss: float) -> bool:
        previous, self.last = self.last, loss
        return previous is not None and loss > previous * (1.0 - self.patience)
