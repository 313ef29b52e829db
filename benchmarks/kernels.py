"""Every kernel: twin against twin, against the naive torch form, and (hash grid) against the floor that memory sets.

    python benchmarks/kernels.py                       about four minutes on two idle cores
    python benchmarks/kernels.py --only hashgrid vm --rounds 3

Variants of an operator take turns round by round, so that they meet the same load; the table has the medians. On a CUDA
machine the same runs there, with tinycudann and nerfacc where they can be imported. Written to
benchmarks/results/kernels-{cpu,cuda}.{md,json}.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import tables
import torch
from kernel_cases import Case, cases, hash_case, uniform
from torch import Tensor

from pvdconvert.kernels import backend, hashgrid

LIBRARIES = ("triton", "tinycudann", "nerfacc")
# Operator -> how many times the naive form's time ours may take less; forward and backward together where it has both.
BARS = {"hashgrid": 8.0, "vm": 5.0, "cp": 10.0, "voxels": 4.0, "march": 12.0, "composite": 3.0}
FLOOR = 3.0

Call = Callable[[], Any]

# ----------------------------------------------------------------------------------------------------------- the floor


def gather_rate(device: str, floats: int, count: int = 1 << 22) -> float:
    """Random reads a second from a table of ``floats``; the best of five."""
    table = torch.ones(floats, device=device)
    index = torch.randint(floats, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(device)
    if device == "cpu" and backend.has_numba():
        probe = _probe()
        threads = torch.get_num_threads()
        return count / best(lambda: probe(table.numpy(), index.numpy(), threads))
    return count / best(lambda: table[index.long()])


def _probe() -> Callable[..., Any]:
    import numba

    def read(table: Any, index: Any, parts: int) -> float:
        total = 0.0
        chunk = (index.shape[0] + parts - 1) // parts
        for part in numba.prange(parts):
            own = 0.0
            for i in range(part * chunk, min(index.shape[0], (part + 1) * chunk)):
                own += table[index[i]]
            total += own
        return total

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    return numba.njit(parallel=True, fastmath=True)(read)  # type: ignore[no-any-return]


def best(run: Call, times: int = 5) -> float:
    run()
    return min(clock(run)[0] for _ in range(times))


def hash_floor(device: str, points: int) -> dict[str, float]:
    """Seconds that touching the grid's cache lines and streaming inputs and outputs must take (kernels.md 1b).

    Each point touches some lines of 64 bytes on each level; a line costs one random read from a table of that size.
    """
    leaves, _ = hash_case(device, 8)
    table = leaves[0]
    spec = hashgrid.HashGridSpec.make(16, 2, 19, 16, hashgrid.growth(16, 16, 2048, "tcnn"), "tcnn")
    x = uniform(1 << 12, 3, device=device)
    touch, rates = 0.0, {}
    for level in spec.levels:
        rows = torch.stack([r for r, _ in hashgrid._corners(x, level, spec.mode, spec.shift)], 1)
        line = (rows * 8 // 64).sort(1).values
        distinct = float((line.diff(dim=1) != 0).sum() + len(x)) / len(x)
        rates.setdefault(level.entries, gather_rate(device, level.entries * 2))
        touch += points * distinct / rates[level.entries]
    bytes_ = torch.ones(1 << 24, device=device)
    stream = bytes_.numel() * 8 / best(lambda: bytes_.add_(1))  # a read and a write
    features = points * spec.width * 4 / stream
    return {
        "forward": touch + features,
        "both": 2 * touch + 2 * features + table.numel() * 4 / stream,
        "stream_gb_s": stream / 1e9,
        "gather_m_s": rates[1 << 19] / 1e6,
    }


# ------------------------------------------------------------------------------------------------------------- running


def clock(run: Call) -> tuple[float, float]:
    """Wall and CPU seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(case: Case, rounds: int) -> dict[str, dict[str, Any]]:
    """Medians of a case's variants, which take turns: seconds forward, and forward with gradients of all leaves."""
    leaves, variants = case
    seen: dict[str, dict[str, list[tuple[float, float]]]] = {name: {"forward": [], "both": []} for name in variants}

    def forward(run: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            run()

    upper: dict[str, Tensor] = {}  # what comes from above is no work of the operator's

    def both(run: Callable[[], Tensor], name: str) -> None:
        out = run()
        if name not in upper:
            upper[name] = torch.ones_like(out)
        torch.autograd.grad(out, leaves, upper[name], allow_unused=True)

    for number in range(rounds + 1):  # the first compiles and warms up
        for name, (twin, run) in variants.items():
            backend.set_backend(twin)  # type: ignore[arg-type]
            for kind, work in (("forward", forward), ("both", partial(both, name=name))):
                if kind == "both" and not leaves:
                    continue
                taken = clock(partial(work, run))
                if number:
                    seen[name][kind].append(taken)
    backend.set_backend("auto")
    return {
        name: {
            kind: {"wall": statistics.median(w for w, _ in runs), "cpu": statistics.median(c for _, c in runs)}
            for kind, runs in kinds.items()
            if runs
        }
        for name, kinds in seen.items()
    }


def machine(device: str) -> dict[str, Any]:
    found = tables.machine()
    for name in LIBRARIES:
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            found["versions"][name] = "not installed"
    found["gpu"] = torch.cuda.get_device_name() if device == "cuda" else "no GPU ran any of this"
    return {**found, "threads": torch.get_num_threads()}


def report(results: dict[str, Any], floor: dict[str, float] | None, where: dict[str, Any], device: str) -> str:
    fast = "numba" if device == "cpu" else "triton"
    rows, bars = [], []
    for name, found in results.items():
        ours = found.get(fast, found.get("truth"))
        for variant, times in found.items():
            cells = [
                f"{1e3 * times[k][c]:.1f}" if k in times else "" for k in ("forward", "both") for c in ("wall", "cpu")
            ]
            ratios = [f"{times[k]['wall'] / ours[k]['wall']:.1f}x" for k in ("forward", "both") if k in times]
            rows.append([name, variant, *cells, " / ".join(ratios)])
        naive = next((times for variant, times in found.items() if variant.startswith("naive")), None)
        if name in BARS and naive:
            kind = "both" if "both" in naive else "forward"
            wall, cpu = (naive[kind][c] / ours[kind][c] for c in ("wall", "cpu"))
            met = "yes" if wall >= BARS[name] else "no"
            bars.append([f"{name} >= {BARS[name]:g}x over the naive form", f"{wall:.1f}x", f"{cpu:.1f}x", met])
        if name == "hashgrid" and floor:
            wall = ours["both"]["wall"] / floor["both"]
            cpu = ours["both"]["cpu"] / where["threads"] / floor["both"]
            met = "yes" if wall <= FLOOR else "no"
            bars.append([f"hashgrid <= {FLOOR:g}x its floor", f"{wall:.1f}x", f"{cpu:.1f}x", met])
    head = ["operator", "variant", "forward ms", "CPU ms", "with gradients ms", "CPU ms", "over ours"]
    text = f"# Kernels\n\n{tables.on(where)}; {where['threads']} threads; {where['gpu']}\n\n" + tables.markdown(
        head, rows
    )
    if floor:
        text += (
            f"\nFloor of the hash grid: forward {1e3 * floor['forward']:.1f} ms, with gradients"
            f" {1e3 * floor['both']:.1f} ms (random reads {floor['gather_m_s']:.0f} M/s from 4 MiB, streaming"
            f" {floor['stream_gb_s']:.1f} GB/s, both measured in this run).\n"
        )
    return text + "\n" + tables.markdown(["bar", "by the clock", "by CPU time", "met"], bars)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--points", type=int, default=1 << 16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", default=None, help="of the files in benchmarks/results")
    given = parser.parse_args()
    where, floor, results = machine(given.device), None, {}
    for name, make in cases(given.device, given.points).items():
        if given.only and name not in given.only:
            continue
        results[name] = measure(make(), given.rounds)
        if name == "hashgrid":
            floor = hash_floor(given.device, given.points)
        print(name, flush=True)
    text = report(results, floor, where, given.device)
    data = {"machine": where, "floor": floor, "points": given.points, "rounds": given.rounds, "results": results}
    tables.save(given.name or f"kernels-{given.device}", text, data)


if __name__ == "__main__":
    main()
