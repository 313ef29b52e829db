"""What a conversion did, as data: what ``convert`` returns, the CLI prints and ``--json`` writes. No torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

SCHEMA = "pvdconvert/report/1"


@dataclasses.dataclass
class StageReport:
    """One stage: what ran, for how long, and what it gave.

    ``psnr_before`` / ``psnr_after`` are dB against the teacher on the quick held-out views (4 views, 100 px), not
    ``fidelity/1``. ``planned`` is the number of steps that the schedule was made for.
    """

    name: str
    steps: int = 0
    planned: int = 0
    seconds: float = 0.0
    psnr_before: float | None = None
    psnr_after: float | None = None
    note: str = ""


@dataclasses.dataclass
class Report:
    """Schema ``pvdconvert/report/1``. Sizes in bytes, times in seconds, metrics in dB."""

    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    target: dict[str, Any] = dataclasses.field(default_factory=dict)
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)
    stages: list[StageReport] = dataclasses.field(default_factory=list)
    fidelity: dict[str, Any] | None = None
    via: dict[str, Any] | None = None
    images: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    replay: str = ""
    dry_run: bool = False
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """A JSON object without NaN or infinity (they become null)."""
        data: dict[str, Any] = {"schema": SCHEMA}
        for field in dataclasses.fields(self):
            data[field.name] = getattr(self, field.name)
        data["stages"] = [dataclasses.asdict(s) for s in self.stages]
        cleaned = clean(data)
        assert isinstance(cleaned, dict)
        return cleaned


def clean(value: Any) -> Any:
    """``value`` with floats that JSON cannot hold replaced by None, and tuples by lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value
