"""Real pictures beside a conversion: columns for teacher and student, and polishing on the split "train" alone."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pvdconvert
from pvdconvert.cameras import Camera, sphere_cameras
from pvdconvert.data import Dataset, Frame, Pixels
from pvdconvert.errors import PvdError, RequestError, UsageError
from pvdconvert.evaluation import evaluate
from pvdconvert.loading import open_field
from pvdconvert.prepare import Prepared, prepare
from pvdconvert.reality import POLISH, Reality
from pvdconvert.render.images import render_camera, to_uint8
from pvdconvert.report import Report
from pvdconvert.testing.analytic import AnalyticScene

STEPS = "labels=1;features=5/5;density=20/20;color=20/20;render=20/20"
SETS = {"resolution": 24}
SIZE = 24
FIELD = AnalyticScene()


def truth() -> Prepared:
    return prepare(FIELD, FIELD.scene, seconds=1.0)


def pictures(reads: Counter[str], gain: float = 1.0) -> Dataset:
    """What the teacher shows, ``gain`` times as bright: 12 pictures to train, 4 to test."""
    prepared = truth()

    def frame(split: str, k: int, camera: Camera) -> Frame:
        shown = to_uint8(gain * render_camera(FIELD, FIELD.scene, camera, prepared.occupancy, 0.02).rgb)

        def read() -> Pixels:
            reads[split] += 1
            return shown

        return Frame(f"{split}-{k}", camera, read)

    train = sphere_cameras(prepared.box, 12, SIZE, 1)
    test = sphere_cameras(prepared.box, 4, SIZE, 2)
    splits = {s: tuple(frame(s, k, c) for k, c in enumerate(v)) for s, v in (("train", train), ("test", test))}
    return Dataset(Path("pictures"), "hand-made", splits)


def convert(dataset: Dataset, out: Path | None = None, **options: Any) -> Report:
    settings: dict[str, Any] = {"steps": STEPS, "validate": False, "sets": SETS, "seed": 3, **options}
    return pvdconvert.convert(FIELD, "plenoxels", scene=FIELD.scene, out=out, images=dataset, **settings)


def test_the_report_has_a_column_for_each(tmp_path: Path) -> None:
    reads: Counter[str] = Counter()
    dataset = pictures(reads)
    out = tmp_path / "s.safetensors"
    report = convert(dataset, out)
    images = json.loads(json.dumps(report.to_json(), allow_nan=False))["images"]
    assert reads == {"test": 8}  # four pictures, for two fields; none of the split train
    teacher, student = images["teacher"], images["student"]
    assert teacher["metrics"]["psnr"] > 35  # the pictures are its own, but for the step
    assert 10 < student["metrics"]["psnr"] < teacher["metrics"]["psnr"]
    assert teacher["metrics"].keys() == {"psnr", "ssim", "flip"}
    assert [v["name"] for v in student["views"]] == [f"test-{k}" for k in range(4)]
    assert teacher["dataset"]["split"] == student["dataset"]["split"] == "test"
    # The same file judged again, by itself.
    loaded = open_field(out)
    again = evaluate(prepare(loaded.field, loaded.scene), dataset, metrics=("psnr",))
    assert again.mean["psnr"] == pytest.approx(student["metrics"]["psnr"], abs=0.5)
    assert "polished" not in loaded.parts.provenance


def test_polishing_learns_from_real_pixels_of_the_split_train(tmp_path: Path) -> None:
    """Reality is a third brighter than the teacher: who learns from it comes nearer to pictures nobody has shown."""
    reads: Counter[str] = Counter()
    dataset = pictures(reads, gain=1.3)
    plain = convert(dataset).images
    assert plain is not None
    reads.clear()
    out = tmp_path / "s.safetensors"
    steps = f"{STEPS};{POLISH}=40/40"
    report = convert(dataset, out, polish=True, steps=steps)
    assert report.images is not None
    assert reads["test"] == 8  # read to be judged by, after everything was learned
    assert reads["train"] >= 12
    before, after = (v["student"]["metrics"]["psnr"] for v in (plain, report.images))
    assert after > before + 2
    stage = report.stages[-1]
    assert stage.name == POLISH
    assert stage.psnr_after is not None
    assert stage.psnr_before is not None
    assert stage.psnr_after > stage.psnr_before
    assert report.replay.endswith(f"{POLISH}=40/40")
    origin = open_field(out).parts.provenance["polished"]
    assert origin == {"images": "pictures", "format": "hand-made", "split": "train", "frames": 12}
    # The report's replay does the same again, bit for bit.
    other = tmp_path / "again.safetensors"
    convert(dataset, other, polish=True, steps=report.replay)
    assert other.read_bytes() == out.read_bytes()


def test_polishing_that_makes_it_worse_is_undone() -> None:
    """Pixels that were set aside say so: here they are of the split val, which shows something else entirely."""
    reads: Counter[str] = Counter()
    dataset = pictures(reads, gain=1.3)
    grey = tuple(
        dataclasses.replace(f, name=f"val-{k}", read=lambda: np.zeros((SIZE, SIZE, 3), np.uint8))
        for k, f in enumerate(dataset.split("train")[:4])
    )
    dataset = dataclasses.replace(dataset, splits={**dataset.splits, "val": grey})
    report = convert(dataset, polish=True, steps=f"{STEPS};{POLISH}=40/40")
    stage = report.stages[-1]
    assert "undone: it would have cost" in stage.note
    assert stage.psnr_after == stage.psnr_before
    plain = convert(dataset)
    assert plain.images is not None
    assert report.images is not None
    assert report.images["student"]["metrics"] == plain.images["student"]["metrics"]


def test_what_is_only_laid_out_anew_is_judged_once(tmp_path: Path) -> None:
    dataset = pictures(Counter())
    convert(dataset, tmp_path / "a.safetensors")
    reads: Counter[str] = Counter()
    report = pvdconvert.convert(tmp_path / "a.safetensors", "plenoxels", out=tmp_path / "b", images=pictures(reads))
    assert report.plan["kind"] == "transcode"
    assert reads == {"test": 4}
    assert report.images is not None
    assert report.images["teacher"] == report.images["student"]


@pytest.mark.parametrize(
    ("change", "options", "kind", "text"),
    [
        ({}, {"images": None, "polish": True}, UsageError, "--images DATASET"),
        ({}, {"polish": True, "resume": True}, UsageError, "cannot be resumed"),
        ({"splits": {}}, {}, UsageError, "no frames in split 'test'"),
        ({"only": "test"}, {"polish": True}, UsageError, "no frames in split 'train'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    change: dict[str, Any], options: dict[str, Any], kind: type[PvdError], text: str, tmp_path: Path
) -> None:
    dataset = pictures(Counter())
    if "only" in change:
        change = {"splits": {change["only"]: dataset.split(change["only"])}}
    shown = dataclasses.replace(dataset, **change)
    with pytest.raises(kind, match=text):
        pvdconvert.convert(
            FIELD, "plenoxels", scene=FIELD.scene, out=tmp_path / "o.safetensors", **{"images": shown, **options}
        )
    assert list(tmp_path.iterdir()) == []


def test_nobody_is_judged_by_what_it_learned_from() -> None:
    reality = Reality(pictures(Counter()), split="train", polish=True)
    with pytest.raises(RequestError, match="cannot be judged by the pictures it is polished on"):
        pvdconvert.convert(FIELD, "plenoxels", scene=FIELD.scene, images=reality)
