"""``examples/kplanes`` against the program's own file. Its own tests run as installed: see test_third_party.py."""

from __future__ import annotations

import functools
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvdconvert.containers import open_manifest
from pvdconvert.loading import open_field
from pvdconvert.plugin import FORMAT_GROUP, PLUGIN_GROUP
from pvdconvert.registry import Origin, Registry, installed, resolve
from pvdconvert.testing import check_architecture, check_format
from tests import peers


@pytest.fixture(scope="module")
def registry(repo: Path) -> Iterator[Registry]:
    """What is installed, and the example's entry points as its pyproject.toml declares them."""
    project = tomllib.loads((repo / "examples/kplanes/pyproject.toml").read_text())["project"]

    def points(group: str) -> list[Origin]:
        own = project["entry-points"][group]
        made = [
            Origin(name, value, project["name"], project["version"], functools.partial(resolve, value))
            for name, value in own.items()
        ]
        return [*installed(group), *made]

    sys.path.insert(0, str(repo / "examples/kplanes"))
    yield Registry(points)
    sys.path.remove(str(repo / "examples/kplanes"))


def test_it_is_a_stranger_to_the_core(registry: Registry) -> None:
    assert registry.problems() == []
    for entries in (registry.architectures(), registry.formats()):
        assert entries["kplanes"].origin.dist == "pvdconvert-kplanes"
        assert not entries["kplanes"].origin.builtin
    assert "kplanes" not in Registry().names(PLUGIN_GROUP) + Registry().names(FORMAT_GROUP)


def test_conformance(registry: Registry) -> None:
    checks = [*check_architecture("kplanes", registry), *check_format("kplanes", registry)]
    assert len(checks) > 25
    assert [c for c in checks if not c.ok] == []


@pytest.mark.requires_data
def test_the_programs_own_points(data_root: Path, registry: Registry) -> None:
    folder = data_root / "checkpoints/peers/K-Planes"
    loaded = open_field(folder / "model.pth", registry=registry)
    assert loaded.scene.assumed == ("box", "background")  # the rest stands in its config.py
    peers.check_points(loaded, peers.oracle(folder / "oracle_lego.npz"))


@pytest.mark.requires_data
@pytest.mark.slow
def test_the_programs_own_views(data_root: Path, registry: Registry) -> None:
    """The program does not clip to its aabb: inside of that alone, 0.6 dB are missing."""
    folder = data_root / "checkpoints/peers/K-Planes"
    peers.check_views(open_field(folder / "model.pth", registry=registry), peers.oracle(folder / "oracle_lego.npz"))


@pytest.mark.requires_data
def test_it_claims_no_other_file(data_root: Path, registry: Registry) -> None:
    probe = dict(registry.probes())["kplanes"]
    found = {}
    for path in (data_root / "checkpoints").rglob("*"):
        if path.suffix in {".pth", ".tar", ".th", ".npz", ".npy", ".ckpt", ".pt"} and "refuse" not in path.parts:
            match = probe(open_manifest(path))
            found[path.relative_to(data_root / "checkpoints").as_posix()] = match.score if match else 0.0
    assert len(found) > 10
    assert {name for name, score in found.items() if score >= 0.3} == {"peers/K-Planes/model.pth"}


def test_the_tutorial_shows_the_example(repo: Path) -> None:
    """Every paragraph of code in docs/writing-a-plugin.md stands, word for word, in the file that it names."""
    page = (repo / "docs/writing-a-plugin.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") + page.count("```toml") >= 8
    for name, code in blocks:
        source = (repo / "examples/kplanes" / name).read_text(encoding="utf-8")
        for paragraph in code.replace("    ...\n", "").split("\n\n"):
            assert paragraph.strip("\n") in source, f"{name}: {paragraph}"
