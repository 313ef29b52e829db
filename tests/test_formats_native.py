"""The native layout: exact round trips, deterministic bytes, and every way in which a header can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pvdconvert.cameras import Camera
from pvdconvert.containers import open_manifest, safetensors
from pvdconvert.errors import InputError, OutputError, RequestError
from pvdconvert.plugin import ArrayTensor, Parts, ReadOptions
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert_formats.native import Native, probe

FORMAT = Native()


def parts() -> Parts:
    rng = np.random.default_rng(0)
    tensors: dict[str, NDArray[Any]] = {
        "a.w": rng.normal(size=(3, 4)).astype(np.float32),
        "h": rng.normal(size=5).astype(np.float16),
        "i": np.arange(4),
        "mask.bits": np.arange(7, dtype=np.uint8),
    }
    camera = Camera(4, 3, 5.0, 5.5, 2.0, 1.5, ((1.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 2.0), (0.0, 0.0, 1.0, 3.0)), 0.0)
    scene = Scene(
        Box((-1.0, -2.0, -3.0), (1.0, 2.0, 0.1)),
        world=((2.0, 0.0, 0.0, 1.0), (0.0, 2.0, 0.0, 0.0), (0.0, 0.0, 2.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
        background=(0.1, 0.2, 0.3),
        color_space="linear",
        near=0.5,
        step=0.01,
        ray_space=RaySpace("ndc", 504.0, 378.0, 407.5, 1.0),
        cameras=(camera,),
        assumed=("near",),
    )
    config = {"depth": 8, "skips": [4], "scale": 1.25, "name": "x", "none": None}
    provenance = {"teacher": {"sha256": "00"}, "fidelity": 35.5}
    return Parts("nerf", config, {k: ArrayTensor(v) for k, v in tensors.items()}, scene, provenance, ("a note",))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    given = parts()
    FORMAT.write(given, tmp_path / "x.safetensors")
    manifest = open_manifest(tmp_path / "x.safetensors")
    match = probe(manifest)
    assert match is not None
    assert match.score == 1.0
    back = FORMAT.read(manifest, ReadOptions())
    assert (back.architecture, back.config, back.scene) == (given.architecture, given.config, given.scene)
    assert (back.provenance, back.notes) == (given.provenance, given.notes)
    assert set(back.tensors) == set(given.tensors)
    for key, tensor in given.tensors.items():
        np.testing.assert_array_equal(back.tensors[key].numpy(), tensor.numpy())
        assert back.tensors[key].dtype == tensor.dtype
    FORMAT.write(back, tmp_path / "y.safetensors")
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def written(path: Path, header: Any) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    safetensors.write(path, {"x": ArrayTensor(np.zeros(2, np.float32))}, {"pvdconvert": text})
    return path


def good(**changes: Any) -> dict[str, Any]:
    scene = Scene(Box.cube(1.0)).to_json()
    header = {"version": 1, "architecture": "nerf", "config": {}, "scene": scene, "provenance": {}, **changes}
    return {k: v for k, v in header.items() if v != "absent"}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (good(version=2), "version 2, this release reads 1.*upgrade"),
        (good(version="absent"), "no readable"),
        ("{", "no readable"),
        ("[]", "no readable"),
        ("[" * 100_000, "no readable"),
        (good(architecture="absent"), "'architecture' is missing"),
        (good(architecture=1), "'architecture'"),
        (good(config=[]), "'config'"),
        (good(scene="absent"), "'scene'"),
        (good(scene={}), "scene.*'box'"),
        (good(scene={"box": {"min": [0, 0, 0], "max": [0, 1, 1]}}), "is empty"),
        (good(provenance=None), "'provenance'"),
    ],
)
def test_wrong_headers(tmp_path: Path, header: Any, match: str) -> None:
    path = written(tmp_path / "x.safetensors", header)
    with pytest.raises(InputError, match=match) as caught:
        FORMAT.read(open_manifest(path), ReadOptions())
    assert str(path) in str(caught.value)


def test_a_foreign_safetensors_is_only_a_resemblance(tmp_path: Path) -> None:
    safetensors.write(tmp_path / "x", {"x": ArrayTensor(np.zeros(2))}, {})
    manifest = open_manifest(tmp_path / "x")
    match = probe(manifest)
    assert match is not None
    assert match.score < 0.3
    with pytest.raises(InputError, match="no readable"):
        FORMAT.read(manifest, ReadOptions())


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    given = parts()
    bad = Parts("nerf", {"x": float("nan")}, given.tensors, given.scene)
    with pytest.raises(RequestError, match="not JSON"):
        FORMAT.write(bad, tmp_path / "x")
    with pytest.raises(OutputError, match="cannot be written"):
        FORMAT.write(given, tmp_path / "missing" / "x")
