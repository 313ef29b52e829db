"""What ``convert`` hands to the library, and what becomes of what comes back: with a library that only records."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvdconvert import errors
from pvdconvert.cli.main import run
from pvdconvert.plugin import ArrayTensor, Parts
from pvdconvert.registry import default
from pvdconvert.report import Report, StageReport
from pvdconvert.scene import Box, Scene

Calls = list[dict[str, Any]]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A small file that inspects well."""
    path = tmp_path / "teacher.safetensors"
    tensors = {
        "trunk.weight": ArrayTensor(np.ones((4, 3), np.float32)),
        "head.bias": ArrayTensor(np.ones(2, np.float16)),
    }
    scene = Scene(Box.cube(1.5), background=(0.0, 0.5, 1.0), near=2.0, assumed=("near", "order"))
    code = default().format("pvdconvert")
    code.write(Parts("nerf", {"depth": 1}, tensors, scene, {"tool": "test"}, ("guessed",)), path)
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """The keyword arguments of every call of ``pvdconvert.pipeline.convert``."""
    seen: Calls = []

    def convert(source: Path, to: str, **options: Any) -> Report:
        seen.append({"source": source, "to": to, **options})
        options["progress"].stage("density", 10)
        options["progress"].advance(10, psnr=30.0)
        options["progress"].close()
        target = {"path": str(options["out"]), "architecture": to, "bytes": 1234}
        return Report(
            {"path": str(source)}, target, stages=[StageReport("density", 10, 10, 1.0, 20.0, 30.0)], seconds=1.0
        )

    _install(monkeypatch, convert)
    monkeypatch.chdir(tmp_path)
    return seen


def _install(monkeypatch: pytest.MonkeyPatch, convert: Callable[..., Report]) -> None:
    fake = types.ModuleType("pvdconvert.pipeline")
    fake.convert = convert  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pvdconvert.pipeline", fake)


def test_defaults_and_the_derived_name(teacher: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(teacher), "--to", "tensorf"]) == 0
    (call,) = calls
    assert call["source"] == teacher
    assert call["to"] == "tensorf"
    assert call["out"] == Path("teacher-tensorf.safetensors")
    assert call["preset"] == "balanced"
    assert call["device"] == "auto"
    for name in ("budget", "max_mb", "min_psnr", "as_", "from_", "cameras", "steps"):
        assert call[name] is None
    for name in ("dry_run", "force", "resume"):
        assert call[name] is False
    assert call["sets"] == {}
    assert call["seed"] == 0
    assert call["stop"]() is False
    told = capsys.readouterr()
    assert "wrote teacher-tensorf.safetensors, 1.2 kB" in told.out
    assert "teacher-tensorf.safetensors" in told.err
    assert "[density] ends after" in told.err
    assert "density" in told.out


def test_every_option_arrives(teacher: Path, calls: Calls, tmp_path: Path) -> None:
    cameras, config = tmp_path / "transforms.json", tmp_path / "config.txt"
    pose = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]]
    cameras.write_text(
        json.dumps({"w": 8, "h": 8, "fl_x": 9.0, "frames": [{"file_path": "a", "transform_matrix": pose}]})
    )
    config.touch()
    (tmp_path / "out.safetensors.resume").mkdir()
    args = (
        f"convert {teacher} -t nerf -o out.safetensors --from pvdconvert --as pvdconvert --preset fast --budget 1m30s "
        "--max-mb 2.5 --set depth=4 --set skips=1,2 --device cpu --backend torch --seed 7 --min-psnr 20 --force "
        f"--resume --cameras {cameras} --bounds -1,-2,-3,1,2,3 --background 1,0,0 --near 0.5 --far 4 --config {config} "
        "-q"
    )
    assert run(args.split()) == 0
    (call,) = calls
    assert call["out"] == Path("out.safetensors")
    assert call["from_"] == call["as_"] == "pvdconvert"
    assert (call["preset"], call["budget"], call["max_mb"], call["seed"]) == ("fast", 90.0, 2.5, 7)
    assert call["sets"] == {"depth": 4, "skips": [1, 2]}
    assert (call["device"], call["min_psnr"], call["force"], call["resume"]) == ("cpu", 20.0, True, True)
    assert call["cameras"] == cameras
    read = call["read"]
    assert read.bounds == Box((-1, -2, -3), (1, 2, 3))
    assert (read.background, read.near, read.far, read.config) == ((1.0, 0.0, 0.0), 0.5, 4.0, config)
    from pvdconvert.kernels.backend import get_backend

    assert get_backend() == "torch"


def test_what_a_format_does_not_ask_for_is_refused_or_noted(
    teacher: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(teacher), "--to", "nerf", "--extra", "focal=400"]) == 2
    assert "--extra focal: format 'pvdconvert' asks for no such entry" in capsys.readouterr().err
    assert calls == []
    assert run(["inspect", str(teacher), "--bounds", "0,0,0,1,1,1", "--far", "9", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["notes"] == ["guessed", "--bounds is not used: a pvdconvert file says it itself"]
    assert document["scene"]["far"] == 9.0


def test_threads_reach_torch(teacher: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    before = torch.get_num_threads()
    try:
        assert run([str(teacher), "--to", "nerf", "--threads", "2", "-q"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_json_is_the_only_thing_on_stdout(teacher: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(teacher), "--to", "nerf", "--json", "--progress", "json", "--report", "r.json"]) == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert document["schema"] == "pvdconvert/report/1"
    assert document["stages"][0]["psnr_after"] == 30.0
    assert json.loads(Path("r.json").read_text()) == document
    for line in told.err.splitlines():
        assert "event" in json.loads(line)


def test_quiet_says_nothing(teacher: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([str(teacher), "--to", "nerf", "-q"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.InputError("a\nb", hint="c"), 3, "a b (c)"),
        (errors.UnknownError("u"), 4, "u"),
        (errors.PluginError("p"), 5, "p"),
        (errors.QualityError("q"), 6, "q"),
        (errors.DeviceError("d"), 7, "d"),
        (errors.UnsafeError("s"), 8, "s"),
        (errors.OutputError("o"), 9, "o"),
        (errors.RequestError("r"), 10, "r"),
        (errors.Interrupted("stopped", hint="--resume"), 130, "stopped (--resume)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 7, "out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
            7,
            "out of memory",
        ),
        (OSError(28, "No space left on device", "out.x"), 9, "out.x: cannot be written: No space left"),
        (ZeroDivisionError("oops\nmore"), 1, "internal error: ZeroDivisionError: oops (run with -v for the traceback)"),
    ],
)
def test_every_failure_is_one_line_with_its_code(
    error: BaseException,
    code: int,
    words: str,
    teacher: Path,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any, **options: Any) -> Report:
        raise error

    _install(monkeypatch, fail)
    assert run([str(teacher), "--to", "nerf", "--progress", "none"]) == code
    told = capsys.readouterr()
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    assert told.err.startswith("pvdconvert: error: ")
    assert words in told.err
    assert run([str(teacher), "--to", "nerf", "--progress", "none", "--json"]) == code
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["exit_code"]) == ("pvdconvert/error/1", code)


def test_verbose_shows_the_traceback(
    teacher: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> Report:
        raise ZeroDivisionError("oops")

    _install(monkeypatch, fail)
    assert run([str(teacher), "--to", "nerf", "-v"]) == 1
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told
    assert told.splitlines()[-1].startswith("pvdconvert: error: internal error: ZeroDivisionError")


def test_a_left_over_of_an_interrupted_run_is_pointed_out(
    teacher: Path, calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(teacher), "--to", "nerf", "--resume"]) == 2
    assert "there is no teacher-nerf.safetensors.resume" in capsys.readouterr().err
    (tmp_path / "teacher-nerf.safetensors.resume").mkdir()
    assert run([str(teacher), "--to", "nerf"]) == 0
    assert "--resume would continue it" in capsys.readouterr().err


def test_inspect_says_what_is_in_the_file(teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(teacher), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "pvdconvert/inspect/1"
    assert (document["format"], document["architecture"]) == ("pvdconvert", "nerf")
    assert (document["parameters"], document["bytes"]) == (14, 52)
    parts = {p["name"]: (p["tensors"], p["parameters"], p["bytes"], p["dtypes"]) for p in document["parts"]}
    assert parts == {"trunk": (1, 12, 48, ["float32"]), "head": (1, 2, 4, ["float16"])}
    assert document["scene"]["near"] == 2.0
    assert document["notes"] == ["guessed"]
    assert document["candidates"][0]["format"] == "pvdconvert"
    assert run(["inspect", str(teacher)]) == 0
    text = capsys.readouterr().out
    assert "(-1.5, -1.5, -1.5) .. (1.5, 1.5, 1.5), sides (3, 3, 3) world units\n" in text
    assert "near         2  (assumed)" in text
    assert "background   (0, 0.5, 1)" in text
    assert "order            the program's default" in text
    assert "note  guessed" in text


def test_what_is_told_to_inspect_reaches_the_scene(capsys: pytest.CaptureFixture[str], data_root: Path) -> None:
    path = data_root / "checkpoints" / "bmild-lego"
    assert run(["inspect", str(path), "--bounds=-1,-1,-1,2,2,2", "--background", "black", "--json"]) == 0
    scene = json.loads(capsys.readouterr().out)["scene"]
    assert scene["box"] == {"min": [-1, -1, -1], "max": [2, 2, 2]}
    assert scene["background"] == [0, 0, 0]
