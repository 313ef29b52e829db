"""The whole road into an architecture, once, in few steps: does it end, report itself, and come near its teacher?"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from pvdconvert import registry as registries
from pvdconvert.field import RadianceField
from pvdconvert.testing.analytic import AnalyticScene
from pvdconvert.testing.checks import Check, expect, run

STEPS = "labels=1;density=120;color=120"
"""Steps instead of seconds: a loaded machine takes longer, but comes to the same result."""

MIN_DB = 15.0
"""An empty picture of the scene scores about 10 dB."""


def check_conversion(
    to: str,
    teacher: RadianceField | None = None,
    *,
    steps: str = STEPS,
    registry: registries.Registry | None = None,
) -> Check:
    """Convert ``teacher`` (an :class:`AnalyticScene`, or its like) to architecture ``to`` and read the result back."""

    def convert(scene: AnalyticScene) -> str:
        from pvdconvert.pipeline import convert as run_convert
        from pvdconvert.pipeline import open_field

        with tempfile.TemporaryDirectory(prefix="pvdconvert-selftest-") as folder:
            out = Path(folder) / "student.safetensors"
            report = run_convert(
                teacher or scene,
                to,
                out=out,
                preset="fast",
                steps=steps,
                scene=scene.scene,
                device="cpu",
                validate=False,
                registry=registry,
            )
            data = report.to_json()
            json.dumps(data, allow_nan=False)
            loaded = open_field(out, registry=registry)
            expect(loaded.architecture == to, f"the file holds {loaded.architecture!r}")
            expect(sorted(p.name for p in Path(folder).iterdir()) == [out.name], "files are left behind")
        # The stages' own score, on small held-out views: fidelity/1 would take longer than the conversion.
        scores = [stage["psnr_after"] for stage in data["stages"] if stage["psnr_after"] is not None]
        expect(scores, "no stage of the report has a score")
        expect(scores[-1] >= MIN_DB, f"{scores[-1]:.1f} dB against the teacher after {steps}")
        return f"{scores[-1]:.1f} dB after {steps}"

    return run("conversion", convert, AnalyticScene())
