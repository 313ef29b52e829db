"""``pvdconvert doctor``: what this machine and installation can do, for bug reports. It does load torch."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import typer

from pvdconvert import memory
from pvdconvert.cli.options import Json, Verbose
from pvdconvert.cli.output import block, emit, say, size, style

LIBRARIES = ("torch", "numpy", "numba", "triton", "safetensors", "msgpack", "pyyaml", "pillow", "typer", "rich")


def command(json: Json = False, verbose: Verbose = False) -> None:
    """Check this installation, for bug reports.

    Looks at Python, torch, devices, kernels, plugins and caches. Exit code 7 if torch, 5 if anything else is broken.
    """
    document = examine()
    if json:
        emit(document)
    else:
        _show(document)
    if document["problems"]:
        raise typer.Exit(7 if document["torch"]["error"] else 5)


def examine() -> dict[str, Any]:
    """The ``--json`` document; nothing here raises."""
    torch = _torch()
    plugins = _plugins(load=torch["error"] is None)
    broken = [f"{p['kind']} {p['name']}: {p['reason']}" for p in plugins if p["status"] not in ("ok", "disabled")]
    problems = ([f"torch: {torch['error']}"] if torch["error"] else []) + broken
    kernels = _kernels(torch)
    if kernels["error"]:
        problems.append(f"kernels: {kernels['error']}")
    return {
        "schema": "pvdconvert/doctor/1",
        "pvdconvert": version("pvdconvert"),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cores": _cores(),
        "memory_bytes": _memory(),
        "huge_pages": memory.huge_pages(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "torch": torch,
        "kernels": kernels,
        "plugins": plugins,
        "caches": _caches(),
        "environment": {
            k: os.environ[k]
            for k in sorted(os.environ)
            if k.startswith(("PVDCONVERT_", "NUMBA_", "OMP_", "GOMP_", "THP_"))
        },
        "problems": problems,
    }


def _torch() -> dict[str, Any]:
    found: dict[str, Any] = {"version": _version("torch"), "error": None, "threads": None, "cuda": None, "devices": []}
    try:
        import torch

        found["threads"] = torch.get_num_threads()
        found["cuda"] = torch.version.cuda
        found["devices"] = ["cpu"]
        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                properties = torch.cuda.get_device_properties(index)
                found["devices"].append(f"cuda:{index} {properties.name} ({size(properties.total_memory)})")
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def _kernels(torch: dict[str, Any]) -> dict[str, Any]:
    """The twins that can run here, which of them would, and why the others cannot.

    numba is compiled for once, because a broken LLVM shows only then.
    """
    found: dict[str, Any] = {"backends": [], "absent": {}, "cpu": None, "cuda": None, "slower": None, "error": None}
    if torch["error"] is not None:
        return found
    from pvdconvert.errors import DeviceError
    from pvdconvert.kernels import backend

    for name in backend.NAMES[1:]:
        obstacle = backend.obstacle(name)
        if obstacle is None:
            found["backends"].append(name)
        else:
            found["absent"][name] = f"{obstacle[0]} ({obstacle[1]})"
    try:
        forced = backend.get_backend()
        if "numba" in found["backends"]:
            found["cpu"] = "numba"
            numba = importlib.import_module("numba")
            if numba.njit(lambda a: a + 1)(1) != 2:
                raise RuntimeError("a compiled function gave a wrong answer")
            found["numba_threads"] = int(numba.config.NUMBA_NUM_THREADS)
    except DeviceError as error:
        found["error"] = f"{backend.VARIABLE}: {error}"
        return found
    except Exception as error:
        found["backends"].remove("numba")
        found["error"] = f"numba: {type(error).__name__}: {' '.join(str(error).split())}"
        forced = "torch"
    cuda = len(torch["devices"]) > 1
    found["cpu"] = "torch" if forced == "torch" or found["cpu"] is None else "numba"
    if cuda:
        able = [name for name in ("tinycudann", "triton") if name in found["backends"] and forced in ("auto", name)]
        found["cuda"] = " or ".join(able) or "torch"
    found["slower"] = backend.lost(cuda)
    return found


def _plugins(*, load: bool) -> list[dict[str, Any]]:
    """Every plugin; unlike ``pvdconvert plugins`` this imports the code of those that announce themselves well."""
    from pvdconvert.cli.plugins import describe
    from pvdconvert.errors import PvdError
    from pvdconvert.registry import default

    registry = default()
    rows = describe(registry)
    for row in rows:
        if row["status"] == "ok" and load:
            try:
                (registry.architecture if row["kind"] == "architecture" else registry.format)(row["name"])
            except PvdError as error:
                row["status"], row["reason"] = "broken", str(error)
    return rows


def _caches() -> list[dict[str, Any]]:
    """Where compiled kernels are kept; a folder that cannot be written means compiling anew in every run."""
    import pvdconvert

    named = os.environ.get("NUMBA_CACHE_DIR")
    folders = [Path(named) if named else Path(pvdconvert.__file__).parent / "kernels" / "__pycache__"]
    rows = []
    for folder in folders:
        files = [f for f in folder.rglob("*.nb[ci]") if f.is_file()] if folder.is_dir() else []
        parent = next((p for p in (folder, *folder.parents) if p.is_dir()), Path("/"))
        rows.append(
            {
                "path": str(folder),
                "what": "compiled numba kernels",
                "files": len(files),
                "bytes": sum(f.stat().st_size for f in files),
                "writable": os.access(parent, os.W_OK),
            }
        )
    return rows


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _twins(kernels: dict[str, Any]) -> str:
    if not kernels["backends"]:
        return "none"
    places = [f"{kernels[key]} on {word}" for key, word in (("cpu", "the CPU"), ("cuda", "CUDA")) if kernels[key]]
    return ", ".join(kernels["backends"]) + (f"; runs {', '.join(places)}" if places else "")


def _show(d: dict[str, Any]) -> None:
    torch, kernels = d["torch"], d["kernels"]
    room = f", {size(d['memory_bytes'])} memory" if d["memory_bytes"] else ""
    room += ", no huge pages: large tensors are dear" if d["huge_pages"] is False else ""
    usable = [p for p in d["plugins"] if p["status"] == "ok"]
    names = {
        kind: ", ".join(p["name"] for p in usable if p["kind"] == kind) or "none" for kind in ("architecture", "format")
    }
    for line in block(
        [
            ("pvdconvert", d["pvdconvert"]),
            ("python", f"{d['python']} ({d['executable']})"),
            ("machine", f"{d['platform']}, {d['cores']} cores{room}"),
            (
                "torch",
                torch["error"] or f"{torch['version']}, {torch['threads']} threads, CUDA {torch['cuda'] or 'no'}",
            ),
            ("devices", "; ".join(torch["devices"]) or "none"),
            ("kernels", _twins(kernels)),
            *(("", reason) for reason in kernels["absent"].values()),
            *(("", kernels["slower"]) for _ in range(kernels["slower"] is not None)),
            ("libraries", ", ".join(f"{k} {v or 'missing'}" for k, v in d["libraries"].items() if k != "torch")),
            ("architectures", names["architecture"]),
            ("layouts", names["format"]),
            *(
                (
                    "cache",
                    f"{c['path']} ({c['files']} files, {size(c['bytes'])}{'' if c['writable'] else ', READ-ONLY'})",
                )
                for c in d["caches"]
            ),
            *(("environment", f"{k}={v}") for k, v in d["environment"].items()),
        ]
    ):
        say(line)
    say()
    if not d["problems"]:
        say(style("no problems found", "green"))
    for problem in d["problems"]:
        say(f"{style('problem', 'red')}  {problem}")
