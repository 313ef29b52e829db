"""The built wheel is the product: it holds what it must, nothing else, and works away from the repository."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = {"pvdconvert", "pvdconvert_plugins", "pvdconvert_formats"}
AGAINST_THE_WHEEL = ["test_scene.py", "test_cameras.py", "test_registry.py"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source tree without a network."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python away from the repository; the unpacked wheel comes before everything that is installed."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_the_wheel_holds_the_packages_and_nothing_else(unpacked: Path) -> None:
    top = {p.name for p in unpacked.iterdir()}
    (info,) = (name for name in top if name.endswith(".dist-info"))
    assert top == {*PACKAGES, info}
    assert all((unpacked / package / "py.typed").is_file() for package in PACKAGES)
    assert list((unpacked / info).rglob("LICENSE"))
    wanted = {p.relative_to(REPO) for p in (REPO / "pvdconvert").rglob("*.py")}
    assert wanted == {p.relative_to(unpacked) for p in (unpacked / "pvdconvert").rglob("*.py")}


def test_the_metadata_announces_what_pyproject_says(unpacked: Path) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    (info,) = unpacked.glob("*.dist-info")
    points = configparser.ConfigParser(delimiters=("=",))
    points.read(info / "entry_points.txt")
    assert dict(points["console_scripts"]) == project["scripts"]
    for group, entries in project["entry-points"].items():
        assert dict(points[group]) == entries
    metadata = (info / "METADATA").read_text()
    assert f"\nVersion: {project['version']}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata


def test_it_is_imported_from_the_wheel_and_all_built_ins_load(unpacked: Path, tmp_path: Path) -> None:
    code = """
import importlib, pathlib, sys
site = pathlib.Path(sys.argv[1])
for name in ("pvdconvert", "pvdconvert_plugins", "pvdconvert_formats"):
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(site), module.__file__
from pvdconvert.registry import default
r = default()
assert not r.problems(), r.problems()
for name in r.architectures():
    module = sys.modules[type(r.architecture(name)).__module__]
    assert pathlib.Path(module.__file__).is_relative_to(site), module.__file__
for name in r.formats():
    r.format(name)
"""
    done = run(unpacked, tmp_path, "-c", code, str(unpacked))
    assert done.returncode == 0, done.stderr


def test_the_command_line_runs_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    done = run(unpacked, tmp_path, "-m", "pvdconvert", "formats")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("ngp", "tensorf", "plenoxels", "nerf"))


def test_the_tests_pass_against_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    files = [str(REPO / "tests" / name) for name in AGAINST_THE_WHEEL]
    options = ["-q", "-p", "no:cacheprovider", "-c", str(REPO / "pyproject.toml"), "--rootdir", str(REPO)]
    done = run(unpacked, tmp_path, "-m", "pytest", *options, *files)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
