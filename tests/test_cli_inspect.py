"""``pvdconvert inspect``: what a newcomer reads of known, half-known and unknown files; and of very large ones."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvdconvert.cli.main import run
from pvdconvert.containers import torch_zip_writer
from pvdconvert.plugin import ArrayTensor, Parts
from pvdconvert.registry import default
from pvdconvert.scene import Box, Scene
from tests.memory import PEAK

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect(capsys: pytest.CaptureFixture[str]) -> Run:
    """``inspect(*arguments)``: (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = run(["inspect", *map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def rows(text: str) -> dict[str, str]:
    """The first word or words of each line -> the rest, as a reader sees columns."""
    split = [line.split("  ", 1) for line in text.splitlines()]
    return {words[0]: words[1].strip() if len(words) > 1 else "" for words in split}


@pytest.fixture(scope="module")
def bare(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample as torch-ngp itself would have saved it: without the scene that we add."""
    held = torch.load(repo / "examples" / "ngp.ckpt", weights_only=True)
    del held["pvdconvert"]["scene"]
    path = tmp_path_factory.mktemp("bare") / "ngp.ckpt"
    torch.save(held, path)
    return path


def test_the_sample_lacks_nothing(inspect: Run, repo: Path) -> None:
    code, text, errors = inspect(repo / "examples" / "ngp.ckpt")
    assert (code, errors) == (0, "")
    assert rows(text)["background"] == "(1, 1, 1)"
    assert json.loads(inspect(repo / "examples" / "ngp.ckpt", "--json")[1])["missing"] == []


def test_a_file_without_a_scene_is_explained(inspect: Run, bare: Path) -> None:
    code, text, errors = inspect(bare)
    assert (code, errors) == (0, "")
    told = rows(text)
    assert told["file"].endswith("ngp.ckpt, 2.4 MB, torch-zip")
    assert told["format"] == "torch-ngp: ashawkey/torch-ngp"
    assert told["architecture"].startswith("ngp: ")
    assert told["weights"] == "614,558 numbers, 2.1 MB"
    assert "levels=16" in told["main settings"]
    assert told["box"] == "(-1, -1, -1) .. (1, 1, 1), sides (2, 2, 2) world units"
    assert told["density"] == "per world unit"
    assert told["cameras"] == "none in the file"
    assert "--near DISTANCE" in text
    assert "--extra desired_resolution=VALUE" in text
    assert told["encoder"].split() == ["1", "496,240", "2.0", "MB", "float32", "248120x2"]
    assert told["torch-ngp"].startswith("0.95")
    assert "bmild" in text


def test_what_is_supplied_is_no_longer_missing(inspect: Run, bare: Path) -> None:
    before = json.loads(inspect(bare, "--json")[1])
    given = ["--near", "0.5", "--background", "black", "--extra", "desired_resolution=2048"]
    after = json.loads(inspect(bare, "--json", *given)[1])
    assert {row["name"] for row in before["missing"]} >= {"near", "background", "desired_resolution"}
    assert {row["name"] for row in after["missing"]} == {"step"}
    assert all(row["supply"] for row in before["missing"] if row["name"] != "step")
    assert after["scene"]["background"] == [0, 0, 0]


def test_our_own_file_says_where_it_came_from(inspect: Run, tmp_path: Path) -> None:
    teacher = {"format": "torch-ngp", "architecture": "ngp", "sha256": "0" * 64}
    said = {"tool": "pvdconvert 9.9", "teacher": teacher, "fidelity": {"psnr": 34.56}, "earlier": {}}
    world = ((0.5, 0.0, 0.0, 1.0), (0.0, 0.5, 0.0, 2.0), (0.0, 0.0, 0.5, 3.0), (0.0, 0.0, 0.0, 1.0))
    scene = Scene(Box.cube(1.0), world=world, color_space="linear")
    parts = Parts("nerf", {"depth": 1}, {"a": ArrayTensor(np.zeros(3, np.float32))}, scene, said)
    default().format("pvdconvert").write(parts, tmp_path / "x.safetensors")
    code, text, _ = inspect(tmp_path / "x.safetensors")
    told = rows(text)
    assert code == 0
    assert told["made by"] == "pvdconvert 9.9, from a torch-ngp file (ngp), 34.56 dB against it"
    assert told["world"] == "dataset = 0.5 x scene + (1, 2, 3) (--json has the matrix)"
    assert told["color space"] == "linear"
    assert told["background"].endswith("--background white|black|R,G,B")


def test_a_file_of_nobody_is_shown_before_it_is_refused(inspect: Run, tmp_path: Path) -> None:
    tensors = {"a.weight": np.zeros((64, 63), np.float32), "a.bias": np.zeros(64, np.float32)}
    torch_zip_writer.write(tmp_path / "x.pt", {"epoch": 7, "state": {**tensors, "b.weight": np.zeros((4, 64))}})
    code, text, errors = inspect(tmp_path / "x.pt")
    assert code == 4
    assert errors.startswith("pvdconvert: error: ")
    assert len(errors.splitlines()) == 1
    told = rows(text)
    assert told["format"] == "none that is known here"
    assert told["looks like"] == "an MLP of a position in 10 frequencies (63 inputs)"
    assert told["trained"] == "epoch 7"
    assert told["weights"] == "4,352 numbers, 18.4 kB"
    assert told["state.a"].split() == ["2", "4,096", "16.4", "kB", "float32"]
    assert "0.00" in text
    code, text, errors = inspect(tmp_path / "x.pt", "--json")
    document = json.loads(text)
    assert (code, document["exit_code"], document["format"], document["scene"]) == (4, 4, None, None)
    assert errors == f"pvdconvert: error: {document['error']}\n"
    assert [t["name"] for t in document["tensors"]] == ["state.a.weight", "state.a.bias", "state.b.weight"]


def test_missing_context_is_asked_for_and_the_rest_is_shown(inspect: Run, tmp_path: Path) -> None:
    """A torch-ngp grid without any box: what it needs is said, what it is is shown."""
    model = {
        "encoder.embeddings": np.zeros((4096, 2), np.float32),
        "encoder.offsets": np.array([0, 4096], np.int32),
        "sigma_net.0.weight": np.zeros((64, 2), np.float32),
        "sigma_net.1.weight": np.zeros((16, 64), np.float32),
        "color_net.0.weight": np.zeros((64, 31), np.float32),
        "color_net.1.weight": np.zeros((3, 64), np.float32),
    }
    torch_zip_writer.write(tmp_path / "x.pth", {"model": model})
    code, text, errors = inspect(tmp_path / "x.pth")
    assert code == 3
    assert "add --bounds" in errors
    assert rows(text)["format"].startswith("torch-ngp")
    assert "encoder" in text
    assert "architecture" not in rows(text)


def test_a_folder_of_several_lists_them(inspect: Run, tmp_path: Path, repo: Path) -> None:
    for name in ("a.pth", "b.pth"):
        (tmp_path / name).write_bytes((repo / "examples" / "ngp.ckpt").read_bytes())
    code, text, errors = inspect(tmp_path)
    assert code == 4
    assert "name one of them" in errors
    assert str(tmp_path / "a.pth") in text
    assert str(tmp_path / "b.pth") in text


# ---------------------------------------------------------------------------------------------- very large files

GIB = 1 << 30


def large_safetensors(path: Path) -> None:
    """1 GiB in one tensor: a header of our own, then a hole."""
    scene = Scene(Box.cube(1.0), background=(1.0, 1.0, 1.0))
    small = Parts("nerf", {"depth": 1}, {"w": ArrayTensor(np.zeros(1, np.float32))}, scene)
    default().format("pvdconvert").write(small, path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    header["w"] = {"dtype": "F32", "shape": [GIB // 4], "data_offsets": [0, GIB]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + GIB)


def large_torch_zip(path: Path) -> None:
    """A torch-ngp checkpoint whose table is 1 GiB of a hole in a stored member."""
    rows_ = GIB // 8
    model: dict[str, Any] = {
        "aabb_infer": np.array([-1, -1, -1, 1, 1, 1], np.float32),
        "encoder.embeddings": np.zeros((1, 2), np.float32),
        "encoder.offsets": np.array([0, rows_], np.int32),
        "sigma_net.0.weight": np.zeros((64, 2), np.float32),
        "sigma_net.1.weight": np.zeros((16, 64), np.float32),
        "color_net.0.weight": np.zeros((64, 31), np.float32),
        "color_net.1.weight": np.zeros((3, 64), np.float32),
    }
    torch_zip_writer.write(path, {"model": model})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # The pickle's words for one row (shape 1 x 2, storage of 2) become those of all rows.
    text = members["archive/data.pkl"]
    one = text.index(b"encoder.embeddings")
    two = text.index(b"encoder.offsets")

    def word(n: int) -> bytes:
        return b"J" + struct.pack("<i", n)

    table = text[one:two].replace(word(2) + b"tQ", word(2 * rows_) + b"tQ")
    table = table.replace(b"(" + word(1) + word(2) + b"t", b"(" + word(rows_) + word(2) + b"t")
    members["archive/data.pkl"] = text[:one] + table + text[two:]
    with path.open("wb") as file:
        entries = []
        for name, payload in members.items():
            size = GIB if name == "archive/data/1" else len(payload)
            entries.append((name, file.tell(), size))
            file.write(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, size, size, len(name), 0))
            file.write(name.encode())
            if size == GIB:
                file.truncate(file.tell() + GIB)
                file.seek(0, 2)
            else:
                file.write(payload)
        start = file.tell()
        for name, at, size in entries:
            file.write(struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, size, size,
                                   len(name), 0, 0, 0, 0, 0, at) + name.encode())  # fmt: skip
        end = file.tell()
        file.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, len(entries), len(entries), end - start, start, 0))


MEASURED = f"""{PEAK}
sys.modules["torch"] = None
from pvdconvert.cli.main import run
code = run(sys.argv[1:])
print(peak(), file=sys.stderr)
sys.exit(code)
"""


LARGE: dict[Callable[[Path], None], list[str]] = {
    large_safetensors: [],
    large_torch_zip: ["--extra", "desired_resolution=2048"],
}


@pytest.mark.parametrize("make", LARGE)
def test_a_gigabyte_is_inspected_without_reading_it(tmp_path: Path, make: Callable[[Path], None]) -> None:
    extra = LARGE[make]
    path = tmp_path / "large"
    make(path)
    if path.stat().st_blocks * 512 > 64 << 20:
        pytest.skip("this file system has no sparse files")
    assert path.stat().st_size > GIB
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "inspect", path, "--json", *extra],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes"] >= GIB
    assert int(done.stderr) < 200 << 20
