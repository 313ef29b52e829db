"""Where the time of a conversion goes: the stages' shares for pairs of architectures, and a profile of each.

    python benchmarks/convert.py                         the sample into every architecture
    python benchmarks/convert.py --from all              every pair (each source is first made of the sample)
    python benchmarks/convert.py --from nerf --to tensorf plenoxels --budget 60s
    python benchmarks/convert.py --from CHECKPOINT --to tensorf plenoxels --preset fast --name convert-lego

Every conversion is a process of the real command line with a profile of each stage (stage_profile.py). Tables go to
benchmarks/results/convert.{md,json}; pairs that are not run keep their earlier figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tables import RESULTS, machine, markdown, on, save

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "examples" / "ngp.ckpt"
FIRST = "ngp"
TINY = "scout=1;labels=1;features=2/2;density=4/4;color=4/4;render=4/4"


def architectures() -> list[str]:
    from pvdconvert.registry import default

    return sorted(default().architectures())


def command(*words: str | Path) -> list[str]:
    return ["-m", "pvdconvert", *map(str, words), "--json", "--progress", "none", "--force"]


def source(architecture: str, folder: Path) -> Path | str:
    """That file; or one of that architecture: the sample, or a hasty student of it. The error's text where there is
    none."""
    if Path(architecture).exists():
        return Path(architecture)
    if architecture == FIRST:
        return SAMPLE
    out = folder / f"{architecture}.safetensors"
    words = command(SAMPLE, "--to", architecture, "-o", out, "--replay", TINY)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    return out if done.returncode == 0 else done.stderr.splitlines()[-1]


def profiled(path: Path, to: str, effort: list[str], folder: Path) -> dict[str, Any]:
    """One conversion: seconds of each step, and what the profile says."""
    dump = folder / "profile.json"
    words = command(path, "--to", to, "-o", folder / f"out-{to}.safetensors", *effort)
    done = subprocess.run(
        [sys.executable, str(HERE / "stage_profile.py"), str(dump), *words[2:]],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"exit_code": done.returncode, "error": done.stderr.splitlines()[-1] if done.stderr else ""}
    report = json.loads(done.stdout)
    stages = {s["name"]: s["seconds"] for s in report["stages"]}
    found = {
        "exit_code": 0,
        "kind": report["plan"]["kind"],
        "seconds": report["seconds"],
        "cpu": report["cpu_seconds"],
        "peak": report["peak_bytes"],
        "psnr": (report["fidelity"] or {}).get("psnr"),
        "stages": stages,
        "rest": report["seconds"] - sum(stages.values()),
    }
    return {**found, "profiles": json.loads(dump.read_text())}


def tell(data: dict[str, Any]) -> str:
    names = ("labels", "projection", "features", "density", "color", "render")
    rows, tops = [], []
    for pair, r in data["pairs"].items():
        if r["exit_code"]:
            rows.append([pair, f"exit {r['exit_code']}: {r['error'].removeprefix('pvdconvert: error: ')}"])
            continue
        share = [f"{100 * r['stages'].get(n, 0.0) / r['seconds']:.0f} %" if n in r["stages"] else "-" for n in names]
        rows.append([pair, r["kind"], f"{r['seconds']:.1f}", f"{r['cpu']:.1f}", *share,
                     f"{100 * r['rest'] / r['seconds']:.0f} %", f"{r['peak'] / 1e6:.0f}",
                     "-" if r["psnr"] is None else f"{r['psnr']:.1f}"])  # fmt: skip
        for stage, p in r["profiles"].items():
            first = ", ".join(f"`{f['function']}` {f['seconds']:.1f} s" for f in p["top"][:3])
            tops.append([pair, stage, f"{p['seconds']:.1f}", f"{100 - 100 * p['native']:.0f} %", first])
    head = [
        "pair",
        "kind",
        "s",
        "CPU s",
        *names,
        "reading, occupancy, validation, writing",
        "peak MB",
        "dB",
    ]
    return "\n".join(
        [
            "# Where the time of a conversion goes\n",
            on(data["machine"]) + "\n",
            f"{data['effort']}. Under torch's profiler: outside kernels and GEMMs is the part of a stage in which "
            "neither an operator of torch nor a kernel of ours ran.\n",
            markdown(head, [[*row, *[""] * (len(head) - len(row))] for row in rows]),
            markdown(["pair", "stage", "s", "outside kernels and GEMMs", "most time of their own"], tops),
        ]
    )


def main() -> None:
    known = architectures()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--from", dest="sources", nargs="+", default=[FIRST], help="architectures, files, or all")
    parser.add_argument("--to", nargs="+", default=known)
    parser.add_argument("--budget", default=None, help="instead of a few steps of each stage")
    parser.add_argument("--preset", default=None, help="instead of a few steps of each stage")
    parser.add_argument("--name", default="convert")
    given = parser.parse_args()
    effort = ["--budget", given.budget] if given.budget else ["--replay", TINY]
    effort = ["--preset", given.preset] if given.preset else effort
    file = RESULTS / f"{given.name}.json"
    data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"pairs": {}}
    data |= {"machine": machine(), "effort": " ".join(effort)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for one in known if given.sources == ["all"] else given.sources:
            path = source(one, folder)
            for to in given.to:
                failed = {"exit_code": 1, "error": f"no source: {path}"}
                found = profiled(path, to, effort, folder) if isinstance(path, Path) else failed
                data["pairs"][f"{Path(one).name} -> {to}"] = found
                print(f"{one} -> {to}: {found.get('seconds', found.get('error'))}", flush=True)
                save(given.name, tell(data), data)


if __name__ == "__main__":
    main()
