"""What a conversion was asked to do, checked before any work. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from pvdconvert.distill import methods
from pvdconvert.errors import PvdError, UsageError
from pvdconvert.plugin import Architecture, Budget, Limits, TeacherFacts
from pvdconvert.scene import Scene

PRESETS: dict[str, float | None] = {"fast": 60.0, "balanced": 300.0, "best": None}
"""Seconds that a preset plans for on two cores; None = until nothing moves."""

BEST_ROUND = 300.0
"""Seconds of a round of preset best; rounds come in cycles, and it goes on while a cycle gains."""

BEST_GAIN = 0.1
"""dB that a cycle must gain for another one to follow."""

BEST_ROUNDS = 6
"""Rounds at most."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The request. Everything in it, with the seed and the steps, reproduces a result."""

    to: str
    preset: str = "balanced"
    budget: float | None = None
    max_mb: float | None = None
    sets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    layout: str | None = None
    min_psnr: float | None = None
    steps: str | None = None
    exact: bool = False
    numbers: str = "same"
    via: str | None = None
    method: str = methods.DEFAULT
    max_memory: int | None = None

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise UsageError(f"unknown preset {self.preset!r}", hint=f"choose {', '.join(PRESETS)}")
        for name in ("budget", "max_mb", "min_psnr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} must be a positive number, got {value}")
        if self.via is not None and (self.exact or self.via == self.to):
            what = "--exact" if self.exact else f"--to {self.to}"
            raise UsageError(f"--via {self.via} and {what} contradict each other")
        methods.parse(self.method)
        if not 0 <= self.seed < 1 << 31:
            raise UsageError(f"seed must be in 0 .. 2^31 - 1, got {self.seed}")

    @property
    def seconds(self) -> float:
        """Seconds to plan the first pass for."""
        return self.budget or PRESETS[self.preset] or BEST_ROUND

    @property
    def rounds(self) -> int:
        """Rounds that may follow the first pass, while they gain."""
        return BEST_ROUNDS if self.preset == "best" and self.budget is None and self.steps is None else 0

    def as_budget(self) -> Budget:
        return Budget(self.preset, self.seconds, self.max_mb)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "sets": dict(self.sets)}


REHEARSED_CELLS = 64
"""Cells along the longest side of the box that :func:`rehearse` plans for."""


def rehearse(settings: Settings, architecture: Architecture, scene: Scene, limits: Limits) -> None:
    """Refuse values of ``--set`` that no teacher could make right, before any work is done for them.

    Plans a student of an imagined teacher with ``--set`` and without; where only the former fails, its error is raised.
    """
    if not settings.sets:
        return
    cells = REHEARSED_CELLS**2
    facts = TeacherFacts(scene, scene.box, cells, cells, scene.box.longest / REHEARSED_CELLS)
    budget = Budget(settings.preset, settings.seconds)
    try:
        architecture.plan(facts, budget, limits, settings.sets)
    except PvdError:
        try:
            architecture.plan(facts, budget, limits, {})
        except PvdError:
            return  # it is not the values of --set that cannot be
        raise


def parse_sets(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Values of ``--set key=value``: JSON where it parses (numbers, true, lists), "a,b,c" as a list, else text."""
    out: dict[str, Any] = {}
    for key, value in sets.items():
        if not isinstance(value, str):
            out[key] = value
            continue
        for text in (value, f"[{value}]"):
            try:
                out[key] = json.loads(text)
                break
            except ValueError:
                out[key] = value
    return out
