"""The same weights in another layout: bit for bit, in the type of the source, and nothing is trained."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvdconvert import convert, errors
from pvdconvert.cli.main import run
from pvdconvert.containers import open_manifest, torch_zip_writer
from pvdconvert.plugin import ArrayTensor, Parts
from pvdconvert.registry import default
from pvdconvert.scene import Box, Scene
from pvdconvert.transcode import obstacle

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        code = run([*map(str, arguments), "--device", "cpu"])
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def grid_file(path: Path, dtype: str = "float32") -> Path:
    """A torch-ngp checkpoint in the program's own key tree: two levels, bound 1, a partly filled bitfield."""
    rng = np.random.default_rng(3)
    sizes = [4920, 1 << 14]  # 16^3 resolution: 17^3 vertices, rounded up to 8; then a full table

    def random(*shape: int) -> np.ndarray[Any, Any]:
        return (rng.standard_normal(shape) * 0.1).astype(dtype)

    bits = np.zeros(128**3 // 8, np.uint8)
    bits[1000:5000] = rng.integers(0, 256, 4000)
    model: OrderedDict[str, Any] = OrderedDict()
    model["aabb_train"] = np.array([-1, -1, -1, 1, 1, 1], np.float32)
    model["aabb_infer"] = np.array([-1, -1, -0.5, 1, 1, 0.5], np.float32)
    model["density_bitfield"] = bits
    model["encoder.embeddings"] = random(sum(sizes), 2)
    model["encoder.offsets"] = np.array([0, sizes[0], sum(sizes)], np.int32)
    for name, shape in {"sigma_net.0": (64, 4), "sigma_net.1": (16, 64), "color_net.0": (64, 31),
                        "color_net.1": (3, 64)}.items():  # fmt: skip
        model[f"{name}.weight"] = random(*shape)
    torch_zip_writer.write(path, {"epoch": 5, "global_step": 1234, "stats": {"loss": []}, "model": model})
    return path


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {name: t.numpy().copy() for name, t in open_manifest(path).tensors.items() if name.startswith("model.")}


GRID = ["--extra", "desired_resolution=2048"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_torch_ngp_to_safetensors_and_back_is_bit_equal(cli: Run, tmp_path: Path, dtype: str) -> None:
    first = grid_file(tmp_path / "a.pth", dtype)
    code, _, told = cli(first, "--exact", "-o", tmp_path / "b.safetensors", *GRID)
    assert code == 0, told
    code, _, told = cli(tmp_path / "b.safetensors", "--exact", "--as", "torch-ngp", "-o", tmp_path / "c.pth")
    assert code == 0, told
    before, after = tensors(first), tensors(tmp_path / "c.pth")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert after[name].dtype == array.dtype, name
        assert after[name].tobytes() == array.tobytes(), name
    meta = open_manifest(tmp_path / "c.pth").meta
    assert (meta["epoch"], meta["global_step"]) == (5, 1234)
    middle = open_manifest(tmp_path / "b.safetensors").tensors
    assert middle["encoder.embeddings"].dtype == dtype


def test_float32_on_request(cli: Run, tmp_path: Path) -> None:
    first = grid_file(tmp_path / "a.pth", "float16")
    code, _, told = cli(first, "--exact", "-o", tmp_path / "b.safetensors", "--dtype", "float32", *GRID)
    assert code == 0, told
    wide = open_manifest(tmp_path / "b.safetensors").tensors["encoder.embeddings"]
    assert wide.dtype == "float32"
    np.testing.assert_array_equal(wide.numpy(), tensors(first)["model.encoder.embeddings"].astype(np.float32))


def test_equal_wishes_do_not_train(cli: Run, tmp_path: Path) -> None:
    first = grid_file(tmp_path / "a.pth")
    asked = ["--set", "levels=2", "--set", "hidden=64", "--max-mb", "10"]
    code, out, _ = cli(first, "--exact", *asked, "--json", "-o", tmp_path / "b.safetensors", *GRID)
    assert (code, json.loads(out)["plan"]["kind"]) == (0, "transcode")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (["--to", "nerf"], "ngp weights are not nerf weights"),
        (["--set", "levels=3"], "the source's levels is 2, and --set asks for 3"),
        (["--max-mb", "0.01"], "more than --max-mb 0.01"),
    ],
)
def test_exact_refuses_what_would_train(cli: Run, tmp_path: Path, wish: list[str], words: str) -> None:
    first = grid_file(tmp_path / "a.pth")
    code, out, told = cli(first, "--exact", *wish, "-o", tmp_path / "b.safetensors", *GRID)
    assert (code, out) == (10, "")
    (line,) = told.splitlines()
    assert words in line
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_exact_refuses_a_layout_that_cannot_hold_the_field(cli: Run, tmp_path: Path) -> None:
    """A grid that is no cube around 0: the layout's writer says so, --exact passes it on."""
    parts = (
        default()
        .format("torch-ngp")
        .read(open_manifest(grid_file(tmp_path / "a.pth")), _options(desired_resolution="2048"))
    )
    config = {**parts.config, "box": [[0, 0, 0], [2, 2, 2]], "mask": None}
    kept = {k: v for k, v in parts.tensors.items() if k != "mask.bits"}
    moved = Parts("ngp", config, kept, Scene(Box((0, 0, 0), (2, 2, 2))))
    default().format("pvdconvert").write(moved, tmp_path / "b.safetensors")
    code, _, told = cli(tmp_path / "b.safetensors", "--exact", "--as", "torch-ngp", "-o", tmp_path / "c.pth")
    assert code == 10
    assert "--exact: this conversion would train, because" in told
    assert "cube around 0" in told
    assert not (tmp_path / "c.pth").exists()


def _options(**extra: str) -> Any:
    from pvdconvert.plugin import ReadOptions

    return ReadOptions(extra=extra)


def test_a_dry_run_tells_without_writing(cli: Run, tmp_path: Path) -> None:
    first = grid_file(tmp_path / "a.pth")
    code, out, _ = cli(first, "--exact", "--dry-run", "--json", "-o", tmp_path / "b.safetensors", *GRID)
    assert (code, json.loads(out)["plan"]["kind"]) == (0, "transcode")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_provenance_stays_because_the_weights_do(tmp_path: Path) -> None:
    said = {"tool": "pvdconvert 0.0", "fidelity": {"psnr": 33.0}}
    parts = (
        default()
        .format("torch-ngp")
        .read(open_manifest(grid_file(tmp_path / "a.pth")), _options(desired_resolution="2048"))
    )
    named = Parts("ngp", parts.config, parts.tensors, parts.scene, said, ("guessed",))
    default().format("pvdconvert").write(named, tmp_path / "b.safetensors")
    report = convert(tmp_path / "b.safetensors", "ngp", out=tmp_path / "c.safetensors", exact=True, device="cpu")
    header = json.loads(open_manifest(tmp_path / "c.safetensors").meta["pvdconvert"])
    assert header["provenance"]["fidelity"] == {"psnr": 33.0}
    assert header["provenance"]["laid_out"]["sha256"] == report.source["sha256"]
    assert header["notes"] == ["guessed"]


def test_obstacles_know_the_defaults_of_a_configuration() -> None:
    parts = Parts("ngp", {"levels": 2}, {"a": ArrayTensor(np.zeros(3, np.float32))}, Scene(Box.cube(1.0)))
    assert obstacle(parts, "ngp", {"hidden": 64}, None, default()) == ""
    assert "hidden" in obstacle(parts, "ngp", {"hidden": 32}, None, default())


# ----------------------------------------------------------------------------------------------- layout by suffix


def test_an_unknown_suffix_is_our_own_layout(cli: Run, tmp_path: Path) -> None:
    code, _, _ = cli(grid_file(tmp_path / "a.pth"), "--exact", "-o", tmp_path / "b.xyz", *GRID)
    assert code == 0
    assert open_manifest(tmp_path / "b.xyz").kind == "safetensors"


def writers(suffix: str, architecture: str) -> list[str]:
    specs = [e.spec for e in default().formats().values()]
    fits = [s for s in specs if s.can_write and suffix in s.suffixes and {"*", architecture} & set(s.architectures)]
    return sorted(s.name for s in fits)


def test_the_suffix_picks_the_layout_or_the_choice_is_listed(cli: Run, tmp_path: Path) -> None:
    first, names = grid_file(tmp_path / "a.pth"), writers(".pth", "ngp")
    code, _, told = cli(first, "--exact", "-o", tmp_path / "b.pth", *GRID)
    if names == ["torch-ngp"]:
        assert code == 0
        assert zipfile.is_zipfile(tmp_path / "b.pth")
    else:
        assert code == 2
        assert "is written by " + " and by ".join(names) in told
        assert f"add --as {names[0]}" in told


def test_a_suffix_that_cannot_be_written_is_refused(cli: Run, tmp_path: Path) -> None:
    code, _, told = cli(grid_file(tmp_path / "a.pth"), "--to", "plenoxels", "-o", tmp_path / "b.npy", *GRID)
    assert code == 2
    assert ".npy is the suffix of bmild" in told
    assert "can only be read" in told


def test_python_refuses_as_well(tmp_path: Path) -> None:
    first = grid_file(tmp_path / "a.pth")
    with pytest.raises(errors.RequestError, match="would train, because ngp weights are not nerf weights"):
        convert(first, "nerf", exact=True, read=_options(desired_resolution="2048"), device="cpu")


# ------------------------------------------------------------------------------------ wishes are judged at once


@pytest.mark.parametrize(
    ("to", "wish"),
    [("ngp", "levels=0"), ("nerf", "width=-1"), ("plenoxels", "bands=9"), ("tensorf", "density_ranks=0")],
)
def test_impossible_values_of_set_are_refused_before_any_work(cli: Run, tmp_path: Path, to: str, wish: str) -> None:
    first = grid_file(tmp_path / "a.pth")
    code, _, told = cli(first, "--to", to, "--set", wish, "--progress", "json", "-o", tmp_path / "b.st", *GRID)
    *events, last = told.splitlines()
    assert code in (2, 3, 10)
    assert wish.partition("=")[0] in last
    assert [json.loads(line)["event"] for line in events if json.loads(line)["event"] == "stage"] == []
