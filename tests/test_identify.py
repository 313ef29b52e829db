"""Identification by content: the order of refusals, ties, probes that fail, folders, and real files."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, UnknownError, UnsafeError
from pvdconvert.identify import GOOD, ask, identify
from pvdconvert.plugin import FORMAT_GROUP, FormatSpec, Match
from pvdconvert.registry import Origin, Registry, default

Probe = Callable[[Any], Any]


class Code:
    """Stands for a format's code; never asked here."""


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """A registry of the given probes by name."""

    def make(**probes: Probe) -> Registry:
        module = types.ModuleType("fake_formats")
        monkeypatch.setitem(sys.modules, "fake_formats", module)
        vars(module).update(probes, Code=Code)
        origins = []
        for name in probes:
            spec = FormatSpec(name, name, f"fake_formats:{name}", "fake_formats:Code", ("nerf",))
            origins.append(Origin(name, f"fake:{name}", "pvdconvert", "0", lambda spec=spec: spec))  # type: ignore[misc]
        return Registry(lambda group: origins if group == FORMAT_GROUP else [])

    return make


def fixed(score: float, reason: str = "because") -> Probe:
    return lambda manifest: Match(score, reason)


@pytest.fixture
def array(tmp_path: Path) -> Path:
    path = tmp_path / "weights.anything"
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 3)))
    return path


def test_the_best_score_wins_and_all_are_listed(formats: Any, array: Path) -> None:
    found = identify(array, None, formats(a=fixed(0.5, "half"), b=fixed(0.9, "most"), c=lambda m: None))
    assert found.format == "b"
    assert found.match == Match(0.9, "most")
    assert [(c.format, c.score) for c in found.candidates] == [("b", 0.9), ("a", 0.5), ("c", 0.0)]
    assert found.manifest.kind == "npy"


def test_a_tie_lists_the_candidates(formats: Any, array: Path) -> None:
    with pytest.raises(UnknownError, match=r"a \(one\) or b \(two\).*--from a") as caught:
        identify(array, None, formats(a=fixed(0.8, "one"), b=fixed(0.8, "two"), c=fixed(0.7)))
    assert caught.value.exit_code == 4


def test_nothing_fits(formats: Any, array: Path) -> None:
    with pytest.raises(
        UnknownError, match=r"npy file with 1 tensors \(array \[2, 3\]\).*closest: b \(nearly\).*--from"
    ):
        identify(array, None, formats(a=lambda m: None, b=fixed(0.1, "nearly")))


def test_a_probe_that_fails_is_a_verdict_not_a_crash(formats: Any, array: Path) -> None:
    def broken(manifest: Any) -> None:
        raise ZeroDivisionError("oh\nno")

    found = identify(array, None, formats(a=broken, b=fixed(0.9), c=lambda m: "nonsense"))
    assert found.format == "b"
    reasons = {c.format: c.reason for c in found.candidates}
    assert reasons["a"] == "its probe failed: ZeroDivisionError: oh no"
    assert reasons["c"].startswith("its probe failed")


def test_from_forces(formats: Any, array: Path) -> None:
    registry = formats(alpha=fixed(0.9), beta=lambda m: None)
    forced = identify(array, "beta", registry)
    assert (forced.format, forced.match) == ("beta", None)
    agreed = identify(array, "alpha", registry)
    assert agreed.match is not None
    with pytest.raises(UnknownError, match="did you mean 'alpha'"):
        identify(array, "alpa", registry)


def test_a_missing_file_is_said_before_anything_else(formats: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        identify(tmp_path / "none.pth", None, formats(a=fixed(0.9)))
    with pytest.raises(InputError, match="no such file"):
        identify(tmp_path / "none.pth", "unknown", formats(a=fixed(0.9)))
    assert caught.value.exit_code == 3


def test_suffixes_are_not_looked_at(formats: Any, tmp_path: Path) -> None:
    for name in ("x.pth", "x.npz", "x", "x.png"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, np.zeros(3))
        assert identify(tmp_path / name, None, formats(a=lambda m: Match(0.9, m.kind))).match == Match(0.9, "npy")


def test_folders(formats: Any, tmp_path: Path) -> None:
    registry = formats(a=lambda m: Match(0.9, "x") if m.kind == "npy" else None)
    with pytest.raises(UnknownError, match="a folder without a checkpoint"):
        identify(tmp_path, None, registry)
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert identify(tmp_path, None, registry).manifest.path == tmp_path / "one.npy"
    np.save(tmp_path / "two.npy", np.zeros(3))
    with pytest.raises(UnknownError, match=r"several checkpoints: one\.npy, two\.npy.*name one"):
        identify(tmp_path, None, registry)
    whole = formats(a=lambda m: Match(0.9, "x"), b=lambda m: Match(0.95, "y") if m.kind == "folder" else None)
    assert identify(tmp_path, None, whole).manifest.path == tmp_path


def test_a_folder_of_one_bad_file_says_what_is_wrong_with_it(formats: Any, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(InputError, match=r"x\.npy.*truncated"):
        identify(tmp_path, None, formats(a=fixed(0.0)))


REAL = {
    "bmild-lego": "bmild",
    "bmild-lego/model_200000.npy": "bmild",
    "krrish94-lego": "krrish94",
    "krrish94-fern/checkpoint249999.ckpt": "krrish94",
    "jiayi-lego100": "jiayi",
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(data_root: Path, name: str) -> None:
    found = identify(data_root / "checkpoints" / name)
    assert found.format == REAL[name]
    assert found.match is not None
    assert found.match.score >= 0.9
    assert [c.format for c in found.candidates if c.score > 0.3] == [REAL[name]]


def test_other_programs_files_are_not_claimed(data_root: Path) -> None:
    """What no format reads yet of the peers' files is refused in one line that says what it looks like."""
    files = [p for p in sorted((data_root / "checkpoints/peers").glob("**/*")) if p.is_file()]
    files = [p for p in files if p.suffix in (".tar", ".pth", ".th", ".npz", ".ckpt")]
    assert len(files) > 8
    for path in files:
        candidates = ask(open_manifest(path), default())
        assert not any(c.score >= GOOD for c in candidates if c.format in {*REAL.values(), "torch-ngp"}), path
        if candidates[0].score < GOOD:
            with pytest.raises(UnknownError, match=r"\d+ tensors \("):
                identify(path)


def test_the_module_pickle_is_refused_as_file_and_as_folder(data_root: Path) -> None:
    for path in ("refuse", "refuse/whole-module-pickle.pt"):
        with pytest.raises(UnsafeError, match="save the state_dict instead") as caught:
            identify(data_root / "checkpoints" / path)
        assert caught.value.exit_code == 8
