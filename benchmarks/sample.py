"""The sample into every architecture, and a chain of files through all of them.

    python benchmarks/sample.py --pairs tensorf:balanced plenoxels:balanced nerf:600s
    python benchmarks/sample.py --chain tensorf plenoxels nerf ngp --budget 120s

Every conversion is a process of the real command line. Tables go to benchmarks/results/sample-{pairs,chain}.{md,json}.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from tables import cli, machine, on, save

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parent / "examples" / "ngp.ckpt"


def effort(text: str) -> list[str]:
    return ["--preset", text] if text.isalpha() else ["--budget", text]


def figures(report: dict[str, Any]) -> str:
    f = report["fidelity"]
    stages = " ".join(
        f"{s['name']} {s['psnr_after']:.1f}" for s in report["stages"] if s["psnr_after"] is not None and s["steps"]
    )
    size = report["target"]["bytes"] / 1e6
    return (
        f"{f['psnr']:.2f} | {f['psnr_worst']:.2f} | {f['psnr_object']:.2f} | {report['wall']:.0f} | "
        f"{report['cpu_seconds']:.0f} | {size:.1f} | {stages}"
    )


HEAD = ["dB (`fidelity/1`)", "worst view", "object only", "s", "CPU s", "MB", "dB on the quick views after each stage"]


def table(title: str, first: list[str], rows: list[str]) -> str:
    head = [*first, *HEAD]
    lines = [f"# {title}", "", on(machine()), "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows]
    return "\n".join(lines) + "\n"


def pairs(wanted: list[str], source: Path, keep: Path, name: str) -> None:
    rows, data = [], []
    for pair in wanted:
        to, _, how = pair.partition(":")
        report = cli(source, "--to", to, "-o", keep / f"{name}-{to}.safetensors", "--force", *effort(how))
        rows.append(f"| {to} | {how} | {figures(report)} |")
        print(rows[-1], flush=True)
        data.append({"to": to, "how": how, **report})
    save(name, table(f"{source.name} into other architectures", ["student", "preset or budget"], rows), data)


def chain(hops: list[str], budget: str, keep: Path, name: str) -> None:
    """Each hop starts from the file that the last one wrote; every file is also compared with the first teacher."""
    rows, data, source = [], [], SAMPLE
    for number, to in enumerate(hops, 1):
        out = keep / f"chain-{number}-{to}.safetensors"
        report = cli(source, "--to", to, "-o", out, "--force", *effort(budget))
        first = cli("compare", SAMPLE, out)
        db = (first.get("fidelity") or first)["psnr"]
        rows.append(f"| {number} | {to} | {db:.2f} | {figures(report)} |")
        print(rows[-1], flush=True)
        data.append({"to": to, "first": db, **report})
        source = out
    title = f"A chain of files from the sample, {budget} a hop"
    save(name, table(title, ["hop", "to", "dB against the first teacher"], rows), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pairs", nargs="*", default=[])
    parser.add_argument("--chain", nargs="*", default=[])
    parser.add_argument("--budget", default="120s", help="of each hop of the chain: a preset or a time")
    parser.add_argument("--source", type=Path, default=SAMPLE)
    parser.add_argument("--keep", type=Path, default=None, help="where the students stay (a temporary folder)")
    parser.add_argument("--name", default=None)
    given = parser.parse_args()
    keep = given.keep or Path(tempfile.mkdtemp())
    keep.mkdir(parents=True, exist_ok=True)
    if given.pairs:
        pairs(given.pairs, given.source, keep, given.name or "sample-pairs")
    if given.chain:
        chain(given.chain, given.budget, keep, given.name or "sample-chain")


if __name__ == "__main__":
    main()
