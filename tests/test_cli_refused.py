"""Requests that cannot be met, through the real command line: one clear line, exit code 10, nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pvdconvert.registry import default
from pvdconvert.scene import Box, RaySpace, Scene
from tests.test_cli_road import ball_parts, cli


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a few kilobytes: a ball, one that is nowhere dense, one with NaN weights, one in a contracted space."""
    folder = tmp_path_factory.mktemp("scenes")
    unbounded = Scene(Box.cube(2.0), ray_space=RaySpace("contracted"), background=(1.0, 1.0, 1.0))
    for name, radius, scene in (
        ("ball", 0.25, None),
        ("empty", -10.0, None),
        ("nan", float("nan"), None),
        ("unbounded", 0.25, unbounded),
    ):
        default().format("pvdconvert").write(ball_parts(radius, scene=scene), folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("scene", "args", "told"),
    [
        ("ball", ("--to", "plenoxels", "--set", "bands=2", "--max-mb", "0.0001"), "--max-mb"),
        ("ball", ("--to", "ngp", "--max-mb", "0.0001"), "--max-mb"),
        ("ball", ("--to", "tensorf", "--max-mb", "0.0001"), "--max-mb"),
        ("ball", ("--to", "tensorf-cp", "--max-mb", "0.0001"), "--max-mb"),
        ("ball", ("--to", "dvgo", "--max-mb", "0.0001"), "--max-mb"),
        ("ball", ("--to", "hybrid", "--max-mb", "0.0001"), "--max-mb"),
        ("ball", ("--to", "nerf", "--max-mb", "0.0001"), "--max-mb"),
        ("nan", ("--to", "ngp"), "NaN"),
        ("empty", ("--to", "ngp"), "no density"),
        ("unbounded", ("--to", "ngp", "--as", "torch-ngp"), "unbounded"),
        ("unbounded", ("--to", "ngp", "--method", "pvd"), "unbounded"),
    ],
)
def test_what_cannot_be_is_one_line(scene: str, args: tuple[str, ...], told: str, scenes: Path, tmp_path: Path) -> None:
    done = cli(
        scenes / f"{scene}.safetensors", *args, "-o", "out", "--budget", "5s", "--progress", "none", cwd=tmp_path
    )
    assert done.returncode == 10, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert told in done.stderr
    assert "(" in done.stderr, "what to type next"
    assert os.listdir(tmp_path) == []
