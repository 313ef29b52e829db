"""The paper's method, its active learning, and ours, side by side: dB over time on the quick views.

    python benchmarks/methods.py --to ngp tensorf plenoxels nerf --budget 60s --factor 10
    python benchmarks/methods.py --source ../shared/data/checkpoints/bmild-lego --to ngp tensorf --name lego

Every run is a process of its own. Ours (``store``) gets ``--budget`` and runs ``--repeat`` times, the median counts; a
method of the paper gets ``--factor`` times the budget and is stopped once it is better than ours ends. Seconds are CPU
seconds divided by the threads, from the first read of the file, the pictures for the curve not counted. The table goes
to benchmarks/results/methods-NAME.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "examples" / "ngp.ckpt"
MARKS = (25.0, 30.0, 33.0, 35.0)
OURS = "store"


def one(
    source: Path, to: str, method: str, budget: float, enough: float, seed: int, sets: dict[str, Any]
) -> dict[str, Any]:
    """One conversion in this process: its curve [(seconds, dB)], report and size."""
    import torch

    from pvdconvert import conversion, convert
    from pvdconvert.errors import Interrupted
    from pvdconvert.looking import QuickScore

    threads = torch.get_num_threads()
    begin, spent, curve = time.process_time(), 0.0, list[tuple[float, float]]()
    latest: list[Any] = []

    class Watched(QuickScore):
        """Remembers itself, so that somebody can look in from outside."""

        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            latest.append(self)

    conversion.__dict__["QuickScore"] = Watched

    def now() -> float:
        return (time.process_time() - begin - spent) / threads

    def look() -> float:
        nonlocal spent
        at, clock = now(), time.process_time()
        curve.append((at, latest[-1]()))
        spent += time.process_time() - clock
        return curve[-1][1]

    def stop() -> bool:
        if curve and now() < max(curve[-1][0] * 1.25, curve[-1][0] + 2.0):
            return False
        return look() >= enough

    stopped, data = False, dict[str, Any]()
    try:
        report = convert(source, to, method=method, budget=budget, sets=sets, seed=seed, stop=stop)
        data = report.to_json()
    except Interrupted:
        stopped = True
    else:
        curve.append((now(), data["stages"][-1]["psnr_after"]))
    return {
        "to": to,
        "method": method,
        "budget": budget,
        "seed": seed,
        "threads": threads,
        "curve": curve,
        "stopped": stopped,
        "seconds": now(),
        "fidelity": (data.get("fidelity") or {}).get("psnr"),
        "bytes": data.get("target", {}).get("bytes"),
        "stages": data.get("stages"),
        "config": data.get("plan", {}).get("config"),
    }


def child(source: Path, *words: str) -> dict[str, Any]:
    """:func:`one` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--source", str(source), "--one", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def reached(run: dict[str, Any], mark: float) -> float | None:
    """Seconds until the curve first reaches ``mark`` dB, or None."""
    return next((at for at, db in run["curve"] if db is not None and db >= mark), None)


def final(run: dict[str, Any]) -> float:
    """dB of the quick views at the end."""
    return float(run["curve"][-1][1])


def cell(run: dict[str, Any], mark: float) -> str:
    at = reached(run, mark)
    return f"> {run['seconds']:.0f}" if at is None and not run["stopped"] else "-" if at is None else f"{at:.1f}"


def ratio(run: dict[str, Any], ours: dict[str, Any]) -> str:
    """How many times longer than ours, to the last whole dB that both reach; and to ours' end, if never reached."""
    end = final(ours)
    at, own = reached(run, end), reached(ours, end)
    if at is not None and own:
        return f"{at / own:.1f}x to {end:.1f} dB"
    best = max(db for _, db in run["curve"])
    same = reached(ours, best)
    late = "" if not own else f"> {run['seconds'] / own:.0f}x to {end:.1f} dB"
    if not same:
        return late
    return f"{late}; {(reached(run, best) or 0.0) / same:.1f}x to {best:.1f} dB"


def table(title: str, runs: list[list[dict[str, Any]]]) -> str:
    heads = [
        "student",
        "method",
        *(f"s to {m:.0f} dB" for m in MARKS),
        "end, dB",
        "fidelity/1, dB",
        "s",
        "MB",
        "slower",
    ]
    lines = [f"# {title}", "", machine(), "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for group in runs:
        ours = next((r for r in group if r["method"] == OURS), None)
        for run in group:
            figures = [cell(run, m) for m in MARKS]
            fidelity = "" if run["fidelity"] is None else f"{run['fidelity']:.2f}"
            size = "" if run["bytes"] is None else f"{run['bytes'] / 1e6:.1f}"
            slower = "" if ours is None or run is ours else ratio(run, ours)
            row = [run["to"], f"`{run['method']}`", *figures, f"{final(run):.2f}", fidelity]
            lines.append("| " + " | ".join([*row, f"{run['seconds']:.0f}", size, slower]) + " |")
    lines += ["", "`-`: stopped before, being better than ours ends. `>`: not within its time."]
    return "\n".join(lines) + "\n"


def machine() -> str:
    load = f"load {os.getloadavg()[0]:.1f}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {load}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--source", type=Path, default=SAMPLE)
    parser.add_argument("--to", nargs="+", default=["ngp", "tensorf", "plenoxels", "nerf"])
    parser.add_argument("--methods", nargs="+", default=[OURS, "pvd", "pvd-al"], help="with options: pvd:rays=512")
    parser.add_argument("--budget", default="60s", help="of ours")
    parser.add_argument("--factor", type=float, default=10.0, help="times the budget, for the methods of the paper")
    parser.add_argument(
        "--repeat", type=int, default=1, help="runs of ours; the median by its end counts, all are kept"
    )
    parser.add_argument("--name", default="sample")
    parser.add_argument(
        "--one", nargs=6, metavar=("TO", "METHOD", "SECONDS", "ENOUGH", "SEED", "SETS"), help=argparse.SUPPRESS
    )
    given = parser.parse_args()
    if given.one:
        to, method, budget, enough, seed, sets = given.one
        found = one(given.source, to, method, float(budget), float(enough), int(seed), json.loads(sets))
        print(json.dumps(found))
        return
    seconds = float(given.budget.rstrip("s"))
    groups, kept = [], []
    for to in given.to:
        group: list[dict[str, Any]] = []
        enough, sets = float("inf"), "{}"
        for method in sorted(given.methods, key=lambda m: m != OURS):
            ours = method == OURS
            budget, repeat = (seconds, given.repeat) if ours else (seconds * given.factor, 1)
            rest = (str(budget), str(enough))
            runs = [child(given.source, to, method, *rest, str(k), sets) for k in range(repeat)]
            kept += runs
            middle = statistics.median_low([final(r) for r in runs])
            run = next(r for r in runs if final(r) == middle)
            if ours:  # the others teach the very same student
                enough = final(run)
                sets = json.dumps({k: v for k, v in run["config"].items() if v is not None})
            group.append(run)
            print(f"{to} {method}: {final(run):.2f} dB in {run['seconds']:.0f} s", flush=True)
        groups.append(group)
        where = HERE / "results"
        where.mkdir(exist_ok=True)
        title = f"Methods on {given.source.name}: ours in {given.budget}, others up to {given.factor:g} times that"
        text = table(title, groups)
        (where / f"methods-{given.name}.md").write_text(text)
        (where / f"methods-{given.name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    from pvdconvert import launch

    launch.prepare()
    main()
