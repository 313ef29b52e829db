"""One of the processes of tests/test_parallel.py: a tiny conversion of an analytic teacher, by as many as there are."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import pvdconvert
from pvdconvert import ranks
from pvdconvert.cli.ending import leave
from pvdconvert.errors import PvdError
from pvdconvert.testing.analytic import AnalyticScene


def main(out: Path, to: str, sets: str, steps: str, fail: str) -> int:
    field = AnalyticScene()
    if fail == str(ranks.rank()):
        asked = field.color
        calls = [0]

        def dies(latent: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
            calls[0] += 1
            return asked(latent, d) if calls[0] < 40 else asked(latent, d) * torch.nan

        field.color = dies  # type: ignore[method-assign]
    try:
        report = pvdconvert.convert(
            field, to, scene=field.scene, out=out, sets=json.loads(sets), steps=steps or None, parallel=True,
            budget=None if steps else 3.0, validate=False,
        )  # fmt: skip
    except PvdError as error:
        if ranks.claim():
            print(f"{ranks.prefix()}{error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    if ranks.rank() == 0:
        print(json.dumps(report.to_json()))
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), *sys.argv[2:])
    leave(code)
    sys.exit(code)
