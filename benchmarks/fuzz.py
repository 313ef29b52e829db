"""Mutated checkpoints of every format through container, probes and reader: how many, how far they got, what broke.

    python benchmarks/fuzz.py --inputs 1000000 --jobs 2

writes ``benchmarks/results/fuzz.md``. Inputs are numbered, and the number and ``--seed`` make the input: a crash is
listed with both. Needs the repository: seeds come from the hand-made files of the tests.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from tests.fuzz import drive  # noqa: E402

CHUNK = 5000
RESULT = REPO / "benchmarks" / "results" / "fuzz.md"


def part(folder: str, start: int, count: int, seed: int) -> drive.Outcome:
    """One chunk, in a job."""
    return drive.run(Path(folder), count, start=start, seed=seed)


def begin() -> None:
    drive.quiet_environment()
    drive.limit_memory()


def table(seen: drive.Outcome, wall: float, jobs: int, seed: int) -> str:
    total = sum(seen.inputs.values())
    opened, reached, read = (sum(c.values()) for c in (seen.opened, seen.reached, seen.read))
    lines = [
        "# Fuzzing",
        "",
        f"`python benchmarks/fuzz.py --inputs {total} --jobs {jobs} --seed {seed}`, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, Python {platform.python_version()}, {jobs} jobs, "
        f"{wall / 60:.0f} minutes on a shared machine.",
        "",
        "Sound files of every format are changed: names, shapes, types, values, counts, headers (about half of the "
        "inputs) or bytes (the other half), and go through container, probes and reader, and every tensor is read. "
        f"An input crashes if anything but a refusal in one line comes out, or if it takes {drive.SECONDS:.0f} s, or "
        f"more than {drive.MEMORY >> 20} MiB. A slip is an error that the road words for the reader: a KeyError, say.",
        "",
        "| | inputs | share |",
        "|---|--:|--:|",
        f"| all | {total:,} | 100 % |",
        f"| past the container | {opened:,} | {100 * opened / max(1, total):.0f} % |",
        f"| in a format's reader | {reached:,} | {100 * reached / max(1, total):.0f} % |",
        f"| read to the last tensor | {read:,} | {100 * read / max(1, total):.0f} % |",
        f"| slips | {sum(seen.slips.values()):,} | |",
        f"| **crashes, hangs** | **{len(seen.crashes)}** | |",
        "",
        "| seed's format | inputs | past the container | in a reader | read |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in sorted(seen.inputs | seen.reached):
        counts = (seen.inputs[name], seen.opened[name], seen.reached[name], seen.read[name])
        lines.append(f"| {name} | " + " | ".join(f"{n:,}" for n in counts) + " |")
    lines += [""] + [f"- crash: {text}" for text in seen.crashes]
    lines += [f"- slip: {where}, {count} times" for where, count in seen.slips.most_common(20)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    chosen = parser.parse_args()
    seen, clock = drive.Outcome(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pvdconvert-fuzz-") as name:
        # Each job has seeds of its own: texts beside a seed are changed on disk.
        folders = [f"{name}/{k}" for k in range(chosen.jobs)]
        for folder in folders:
            subprocess.run([sys.executable, "-m", "tests.fuzz.corpus", folder], cwd=REPO, check=True)
        parts = list(drive.chunks(chosen.inputs, CHUNK))
        done = 0
        with concurrent.futures.ThreadPoolExecutor(chosen.jobs) as threads:
            pools = [concurrent.futures.ProcessPoolExecutor(1, initializer=begin) for _ in folders]

            def lane(index: int) -> None:
                nonlocal done
                for start, count in parts[index :: chosen.jobs]:
                    seen.add(pools[index].submit(part, folders[index], start, count, chosen.seed).result())
                    done += count
                    chosen.out.write_text(table(seen, time.monotonic() - clock, chosen.jobs, chosen.seed))
                    print(f"{done:,} of {chosen.inputs:,}, {done / (time.monotonic() - clock):.0f}/s, "
                          f"{len(seen.crashes)} crashes, {sum(seen.slips.values())} slips", flush=True)  # fmt: skip

            list(threads.map(lane, range(chosen.jobs)))
            for pool in pools:
                pool.shutdown()
    if seen.crashes:
        sys.exit(f"{len(seen.crashes)} crashes: see {chosen.out}")


if __name__ == "__main__":
    main()
