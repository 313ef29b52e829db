"""Real pictures beside a conversion: columns for teacher and student, and polishing on the split "train" alone."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import pvdconvert
from pvdconvert.cameras import Camera, sphere_cameras
from pvdconvert.data import Dataset, Frame, Pixels
from pvdconvert.errors import PvdError, RequestError, UsageError
from pvdconvert.evaluation import evaluate
from pvdconvert.loading import open_field
from pvdconvert.prepare import prepare
from pvdconvert.progress import Silent
from pvdconvert.reality import POLISH, Reality
from pvdconvert.registry import default
from pvdconvert.render.images import render_camera, to_uint8
from pvdconvert.report import Report
from pvdconvert.testing.analytic import AnalyticScene

STEPS = "labels=1;features=5/5;density=20/20;color=20/20;render=20/20"
SETS = {"resolution": 24}
SIZE, GAIN = 24, 1.3
FIELD = AnalyticScene()


class Case(NamedTuple):
    """Pictures a third brighter than the teacher shows them, how often each split was read, and a plain student."""

    dataset: Dataset
    reads: Counter[str]
    report: Report
    out: Path
    seen: Counter[str]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    prepared = prepare(FIELD, FIELD.scene, seconds=0.5)
    reads: Counter[str] = Counter()

    def frame(split: str, k: int, camera: Camera) -> Frame:
        shown = to_uint8(GAIN * render_camera(FIELD, FIELD.scene, camera, prepared.occupancy, 0.02).rgb)

        def read() -> Pixels:
            reads[split] += 1
            return shown

        return Frame(f"{split}-{k}", camera, read)

    cameras = {"train": sphere_cameras(prepared.box, 12, SIZE, 1), "test": sphere_cameras(prepared.box, 4, SIZE, 2)}
    splits = {s: tuple(frame(s, k, c) for k, c in enumerate(v)) for s, v in cameras.items()}
    dataset = Dataset(Path("pictures"), "hand-made", splits)
    out = tmp_path_factory.mktemp("reality") / "plain.safetensors"
    report = convert(dataset, out)
    return Case(dataset, reads, report, out, Counter(reads))


def convert(dataset: Dataset, out: Path | None = None, **options: Any) -> Report:
    settings: dict[str, Any] = {"steps": STEPS, "validate": False, "sets": SETS, "budget": 4.0, **options}
    return pvdconvert.convert(FIELD, "plenoxels", scene=FIELD.scene, out=out, images=dataset, **settings)


def test_the_report_has_a_column_for_each(case: Case) -> None:
    images = json.loads(json.dumps(case.report.to_json(), allow_nan=False))["images"]
    assert case.seen == {"test": 8}  # four pictures, for two fields; none of the split train
    teacher, student = images["teacher"], images["student"]
    assert 10 < student["metrics"]["psnr"] < teacher["metrics"]["psnr"] < 40
    assert teacher["metrics"].keys() == {"psnr", "ssim", "flip"}
    assert [v["name"] for v in student["views"]] == [f"test-{k}" for k in range(4)]
    assert teacher["dataset"]["split"] == student["dataset"]["split"] == "test"
    # The teacher's own pictures, a third brighter (bytes are cut at 255): its error follows from them.
    errors = []
    for frame in case.dataset.split("test"):
        truth = frame.read() / 255.0
        errors.append(-10 * np.log10(((truth - truth / GAIN) ** 2).mean()))
    assert teacher["metrics"]["psnr"] == pytest.approx(np.mean(errors), abs=0.5)
    # The same file judged again, by itself.
    loaded = open_field(case.out)
    again = evaluate(prepare(loaded.field, loaded.scene, seconds=0.5), case.dataset, metrics=("psnr",))
    assert again.mean["psnr"] == pytest.approx(student["metrics"]["psnr"], abs=0.5)
    assert "polished" not in loaded.parts.provenance


def test_polishing_learns_from_real_pixels_of_the_split_train(case: Case, tmp_path: Path) -> None:
    """Who learns from brighter pictures comes nearer to those that nobody has shown."""
    case.reads.clear()
    out = tmp_path / "s.safetensors"
    report = convert(case.dataset, out, polish=True, steps=f"{STEPS};{POLISH}=30/30")
    assert report.images is not None
    assert case.report.images is not None
    assert case.reads == {"test": 8, "train": 12}  # the split test only to be judged by
    before, after = (v["student"]["metrics"]["psnr"] for v in (case.report.images, report.images))
    assert after > before + 0.2
    stage = report.stages[-1]
    assert stage.name == POLISH
    assert stage.psnr_after is not None
    assert stage.psnr_before is not None
    assert stage.psnr_after > stage.psnr_before
    assert report.replay.endswith(f"{POLISH}=30/30")
    origin = open_field(out).parts.provenance["polished"]
    assert origin == {"images": "pictures", "format": "hand-made", "split": "train", "frames": 12}


def test_polishing_that_makes_it_worse_is_undone(case: Case) -> None:
    """Pixels that were set aside say so: here they are of the split val, which is black."""
    black = tuple(
        dataclasses.replace(f, name=f"val-{k}", read=lambda: np.zeros((SIZE, SIZE, 3), np.uint8))
        for k, f in enumerate(case.dataset.split("train")[:4])
    )
    dataset = dataclasses.replace(case.dataset, splits={**case.dataset.splits, "val": black})
    loaded = open_field(case.out)
    student = loaded.field.requires_grad_(True)
    prepared = prepare(student, loaded.scene, seconds=0.5)
    before = copy.deepcopy(student.state_dict())
    stage = Reality(dataset, polish=True).polished(
        default().architecture("plenoxels"),
        student,
        prepared.occupancy,
        prepared,
        seconds=1.0,
        fixed=(15, 15),
        seed=0,
        progress=Silent(),
        stop=lambda: False,
    )
    assert "undone: it would have cost" in stage.note
    assert stage.psnr_after == stage.psnr_before
    after = student.state_dict()
    assert all(bool((before[key] == after[key]).all()) for key in before)


def test_what_is_only_laid_out_anew_is_judged_once(case: Case, tmp_path: Path) -> None:
    case.reads.clear()
    report = pvdconvert.convert(case.out, "plenoxels", out=tmp_path / "b", images=case.dataset)
    assert report.plan["kind"] == "transcode"
    assert case.reads == {"test": 4}
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
    change: dict[str, Any], options: dict[str, Any], kind: type[PvdError], text: str, case: Case, tmp_path: Path
) -> None:
    dataset = case.dataset
    if "only" in change:
        change = {"splits": {change["only"]: dataset.split(change["only"])}}
    shown = dataclasses.replace(dataset, **change)
    with pytest.raises(kind, match=text):
        pvdconvert.convert(
            FIELD, "plenoxels", scene=FIELD.scene, out=tmp_path / "o.safetensors", **{"images": shown, **options}
        )
    assert list(tmp_path.iterdir()) == []


def test_nobody_is_judged_by_what_it_learned_from(case: Case) -> None:
    reality = Reality(case.dataset, split="train", polish=True)
    with pytest.raises(RequestError, match="cannot be judged by the pictures it is polished on"):
        pvdconvert.convert(FIELD, "plenoxels", scene=FIELD.scene, images=reality)
