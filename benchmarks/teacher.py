"""How fast a slow teacher answers: the rate of an 8 x 256 MLP against the machine's own rate for matrix products.

    python benchmarks/teacher.py

Needs the real data (PVDCONVERT_DATA or ../shared/data). The machine's rate is that of float32 products of 2048 x 2048
matrices, measured between the teacher's turns in the same run; floating-point operations of the teacher are those of
its matrix products alone, counted by torch, so encodings and activations only cost. The table goes to
benchmarks/results/teacher.{md,json}.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from tables import machine, markdown, on, save

HERE = Path(__file__).resolve().parent
DATA = Path(os.environ.get("PVDCONVERT_DATA", HERE.parent.parent / "shared" / "data"))
BAR = 0.6
"""Share of the machine's rate that evaluating a teacher should come to."""


def operations(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in ``run``."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--source", type=Path, default=DATA / "checkpoints" / "bmild-lego")
    parser.add_argument("--points", type=int, default=1 << 16)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    from pvdconvert.loading import open_field

    field = open_field(given.source).field.eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(given.points, 3, generator=generator) * 2 - 1
    d = torch.nn.functional.normalize(torch.randn(given.points, 4, 3, generator=generator), dim=-1)
    a, b = torch.randn(2048, 2048, generator=generator), torch.randn(2048, 2048, generator=generator)
    tall, square = torch.randn(given.points, 256, generator=generator), torch.randn(256, 256, generator=generator)
    runs: dict[str, Callable[[], object]] = {
        "products of 2048 x 2048": lambda: a @ b,
        f"products of {given.points} x 256 by 256 x 256": lambda: tall @ square,
        "teacher, density": lambda: field.density(field.encode(x)),
        "teacher, density and one colour": lambda: field.color(field.encode(x), d[:, :1]),
        "teacher, density and four colours": lambda: field.color(field.encode(x), d),
    }
    with torch.inference_mode():
        count = {name: operations(run) for name, run in runs.items()}
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(given.rounds + 1):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                spent[name].append(time.perf_counter() - begin)
    rate = {name: count[name] / median(seconds[1:]) / 1e9 for name, seconds in spent.items()}
    own = next(iter(rate.values()))
    body = [
        [name, f"{count[name] / 1e9:.1f}", f"{1e3 * median(spent[name][1:]):.0f}", f"{r:.1f}", f"{r / own:.2f}"]
        for name, r in rate.items()
    ]
    worst = min(r for name, r in rate.items() if name.startswith("teacher")) / own
    text = (
        f"# {given.source.name} as a teacher\n\n{on(machine())}, {torch.get_num_threads()} threads; "
        f"{given.points} points, median of {given.rounds} interleaved rounds\n\n"
        + markdown(["what", "GFLOP", "ms", "GFLOP/s", "of the machine's"], body)
        + f"\nBar: {BAR:g} of the machine's rate; met: {'yes' if worst >= BAR else 'no'} ({worst:.2f})\n"
    )
    save("teacher", text, {"machine": machine(), "rates": rate, "share": worst})


if __name__ == "__main__":
    main()
