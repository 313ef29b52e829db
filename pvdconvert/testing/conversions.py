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
                registry=registry,
            )
            data = report.to_json()
            json.dumps(data, allow_nan=False)
            loaded = open_field(out, registry=registry)
            expect(loaded.architecture == to, f"the file holds {loaded.architecture!r}")
            expect(sorted(p.name for p in Path(folder).iterdir()) == [out.name], "files are left behind")
        expect(data["stages"], "the report lists no stage")
        psnr = (data["fidelity"] or {}).get("psnr")
        expect(psnr is not None and psnr >= MIN_DB, f"{psnr} dB against the teacher after {steps}")
        return f"{psnr:.1f} dB after {data['seconds']:.0f} s"

    return run("conversion", convert, AnalyticScene())
