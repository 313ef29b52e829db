"""``pvdconvert inspect`` of posed pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pvdconvert.cli.main import run
from tests import datasets as made


def test_a_dataset_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.blender(tmp_path, {"train": made.orbit(3), "test": made.orbit(2, 4.2)})
    assert run(["inspect", str(tmp_path)]) == 0
    told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert told["layout"].strip() == "blender: transforms_train.json, transforms_test.json"
    assert told["splits"].strip() == "train 3, test 2"
    assert told["pictures"].strip() == "48x40 (5)"
    assert told["box"].strip() == "(-1.5, -1.5, -1.5) .. (1.5, 1.5, 1.5)"
    assert told["behind alpha"].strip() == "(1, 1, 1)"


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.transforms(tmp_path, made.orbit(9), k1=0.05, camera_model="OPENCV")
    (tmp_path / "images/frame_4.png").unlink()
    assert run(["inspect", str(tmp_path), "--json", "--background", "black", "--bounds", "-1,-2,-3,1,2,3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["schema"], told["kind"]) == ("pvdconvert/inspect-dataset/1", "transforms")
    assert told["splits"] == {"train": 7, "test": 1}
    assert told["sizes"] == [{"width": 48, "height": 40, "pictures": 8}]
    assert told["lenses"] == ["opencv"]
    assert told["box"] == {"min": [-1, -2, -3], "max": [1, 2, 3]}
    assert told["focal"] == pytest.approx([56, 56])
    assert any("frame_4" in note for note in told["notes"])


def test_a_broken_dataset_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.nsvf(tmp_path, {"train": made.orbit(2)})
    (tmp_path / "bbox.txt").write_text("0 0")
    assert run(["inspect", str(tmp_path)]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert "bbox.txt: 2 numbers" in told.err
    assert told.err.count("\n") == 1
