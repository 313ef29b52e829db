"""Train ``ngp.ckpt``, the sample teacher, from the procedural scene beside this file: no images, no other program.

    python examples/make_sample.py                      # examples/ngp.ckpt, about five minutes of two cores
    python examples/make_sample.py --budget 60 -o x.ckpt

The teacher of this conversion is two functions; the student is a small hash grid (table 2^14) in torch-ngp's layout.
Prints its fidelity against the procedural truth by ``fidelity/1`` (docs/conventions.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scene import BACKGROUND, BOX, color, density

import pvdconvert
from pvdconvert.scene import Box, Scene

HERE = Path(__file__).resolve().parent
SETS = {"log2_table": 14}


class Lines:
    """Progress as lines on stderr."""

    def stage(self, name: str, total: float | None = None) -> None:
        print(f"{name} ...", file=sys.stderr, flush=True)

    def advance(self, done: float, **metrics: float) -> None:
        if "psnr" in metrics:
            print(f"  {done:.0f}: {metrics['psnr']:.2f} dB on the quick views", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def close(self) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the sample teacher from the procedural scene.")
    parser.add_argument("-o", "--out", type=Path, default=HERE / "ngp.ckpt")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    report = pvdconvert.convert(
        (density, color),
        "ngp",
        out=given.out,
        as_="torch-ngp",
        scene=Scene(Box(*BOX), background=BACKGROUND),
        preset="best",
        budget=given.budget,
        sets=SETS,
        seed=given.seed,
        force=True,
        progress=Lines(),
    )
    assert report.fidelity is not None
    for stage in report.stages:
        print(f"{stage.name:10s} {stage.steps:6d} steps  {stage.seconds:7.1f} s  {stage.psnr_after} dB  {stage.note}")
    size = given.out.stat().st_size / 1e6
    print(f"{given.out}: {size:.2f} MB, {report.fidelity['psnr']:.2f} dB against the procedural truth (fidelity/1)")


if __name__ == "__main__":
    main()
