"""Training from pictures: every architecture on a tiny dataset, the same again by its replay, resume, bad requests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pvdconvert import registry, training
from pvdconvert.cameras import Camera
from pvdconvert.distill import photometric
from pvdconvert.distill.photometric import Photometric
from pvdconvert.distill.raybank import RayBank, Rays
from pvdconvert.distill.sampling import Samples, Segments, importance, in_cells, reached, segments, stratified
from pvdconvert.errors import InputError, Interrupted, RequestError, UsageError
from pvdconvert.field import RadianceField
from pvdconvert.metrics import psnr
from pvdconvert.pipeline import open_field
from pvdconvert.render.images import render_camera, to_uint8
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.report import Report
from pvdconvert.scene import Box, RaySpace, Scene
from pvdconvert.testing.analytic import AnalyticScene
from tests import posed

READ_ONLY = {"kilonerf"}
NAMES = sorted(set(registry.default().architectures()) - READ_ONLY)
STEPS = "scout-1=30/30;scout-2=30/30;train-1=15/15;train-2=15/15;train-3=15/15;train-4=15/15"
FEW = "scout-1=12/12;scout-2=12/12;train-1=12/12;train-2=12/12;train-3=12/12;train-4=12/12"


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer samples in a step: these pictures are small."""
    monkeypatch.setattr(photometric, "POINTS", 2.0)
    return


def on_test_views(path: Path) -> float:
    """Mean PSNR over black on pictures that were never trained on; the whole box is looked at, so fog counts."""
    loaded = open_field(path)
    whole = Occupancy(torch.tensor([-1.0, -1.0, -1.0]), 0.125, torch.ones(16, 16, 16, dtype=torch.uint8))
    scores = []
    for frame in posed.dataset().split("test"):
        image = render_camera(loaded.field, loaded.scene, frame.camera, whole, 0.04)
        rgba = frame.read().astype(np.float64) / 255
        scores.append(psnr(rgba[..., :3] * rgba[..., 3:], to_uint8(image.rgb)))
    return float(np.mean(scores))


def constant_picture() -> float:
    """What the mean colour of the test views scores on them."""
    views = [f.read().astype(np.float64) / 255 for f in posed.dataset().split("test")]
    flat = np.stack([v[..., :3] * v[..., 3:] for v in views])
    return psnr(flat, np.broadcast_to(flat.mean((0, 1, 2)), flat.shape))


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_learns_the_scene(name: str, tmp_path: Path) -> None:
    out = tmp_path / "field.safetensors"
    report = training.train(posed.dataset(), name, out=out, preset="fast", budget=10.0, max_mb=1.0, steps=STEPS)
    data = report.to_json()
    json.dumps(data, allow_nan=False)
    parts = [s for s in data["stages"] if s["name"].startswith("train-")]
    assert [s["steps"] for s in parts] == [15] * 4
    assert parts[-1]["psnr_after"] > parts[0]["psnr_after"]
    assert data["plan"]["kind"] == "train"
    score = on_test_views(out)
    assert score > constant_picture() + 1, score  # which is 22.1 dB, for most of them is black
    loaded = open_field(out)
    assert loaded.architecture == name
    assert loaded.parts.provenance["how"] == "trained from images"
    assert len(loaded.scene.cameras) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name]


def test_the_original_pipeline_learns_without_cells(tmp_path: Path) -> None:
    out = tmp_path / "field.safetensors"
    sets = {"width": 64, "depth": 4, "direction_layers": [32]}
    steps = "train-1=40/40;train-2=40/40;train-3=40/40;train-4=40/40"
    kept: list[Photometric] = []
    report = training.train(
        posed.dataset(), "nerf", out=out, sampling="hierarchical", sets=sets, steps=steps,
        watch=lambda t, spent: kept.append(t),
    )  # fmt: skip
    assert [s.name for s in report.stages] == [f"train-{k}" for k in (1, 2, 3, 4)]
    trainer = kept[0]
    assert trainer.coarse is not None
    # Both fields have learned, and no cell was ever left out.
    assert trainer.live.count == trainer.live.grid.numel()
    first, last = report.stages[0].psnr_before, report.stages[-1].psnr_after
    assert first is not None and last is not None  # noqa: PT018
    assert last > first + 3


def test_a_replay_gives_the_same_field(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    data = posed.dataset(6, 24)
    first = training.train(data, "ngp", out=a, preset="fast", budget=0.5, sets={"log2_table": 12, "levels": 6})
    assert first.replay.count("=") == 6
    again = training.train(
        data, "ngp", out=b, preset="fast", sets={"log2_table": 12, "levels": 6}, steps=first.replay, budget=0.5
    )
    assert again.replay == first.replay
    ours, theirs = open_field(a).field.state_dict(), open_field(b).field.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("name", ["ngp", "plenoxels"])
def test_an_interrupted_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    def run(out: Path, resume: bool = False, after: int | None = None) -> Report:
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            return asked == after

        return training.train(
            posed.dataset(6, 24),
            name,
            out=out,
            preset="fast",
            max_mb=0.5,
            budget=4.0,
            steps=FEW,
            stop=stop,
            resume=resume,
        )

    whole, halves = tmp_path / "whole.safetensors", tmp_path / "halves.safetensors"
    run(whole)
    with pytest.raises(Interrupted, match="--resume"):
        run(halves, after=24 + 12 + 7)
    assert not halves.exists()
    report = run(halves, resume=True)
    assert [s.name for s in report.stages if s.planned] == [p.split("=")[0] for p in FEW.split(";")]
    ours, theirs = open_field(whole).field.state_dict(), open_field(halves).field.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not halves.with_name("halves.safetensors.resume").exists()


def test_what_is_resumed_must_be_the_same_pictures(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    asked = iter(range(1000))
    with pytest.raises(Interrupted):
        training.train(
            posed.dataset(6, 24), "ngp", out=out, preset="fast", steps=FEW, stop=lambda: next(asked) == 30,
            sets={"log2_table": 12, "levels": 4},
        )  # fmt: skip
    with pytest.raises(UsageError, match="sha256"):
        training.train(
            posed.dataset(5, 24), "ngp", out=out, preset="fast", resume=True, sets={"log2_table": 12, "levels": 4}
        )


def test_pictures_without_alpha_and_without_a_box() -> None:
    data = dataclasses.replace(posed.dataset(12, 24, opaque=True), box=None)
    report = training.train(data, "ngp", preset="fast", steps=FEW, sets={"log2_table": 12, "levels": 6})
    assert any("the background is what the pictures' borders show: 0,0,0" in n for n in report.notes)
    assert any("what the cameras look at" in n for n in report.notes)


# -- the numbers ---------------------------------------------------------------------------------------------------


def trainer(bank: RayBank, scene: Scene, cells: Occupancy) -> Photometric:
    class Silent:
        def stage(self, name: str, total: float | None = None) -> None: ...
        def advance(self, done: float, **metrics: float) -> None: ...
        def note(self, text: str) -> None: ...
        def close(self) -> None: ...

    from pvdconvert.distill.scout import Scout, ScoutField

    return Photometric(Scout(), ScoutField(scene, 8), bank, scene, cells, step=0.05, seed=0, progress=Silent())


@pytest.fixture(scope="module")
def small() -> Photometric:
    scene = AnalyticScene()
    cells = scene.occupancy(16)
    return trainer(RayBank(posed.frames(4, 16, 5)), scene.scene, cells)


def test_backgrounds_are_all_colours_at_once(small: Photometric) -> None:
    """One ray: ours (0.2, 0.5, 0.1) over nothing with opacity 0.5, theirs (0.8, 0.4, 0) straight with opacity 0.75.

    c = (-0.4, 0.2, 0.1), o = -0.25: squares 0.16 + 0.04 + 0.01 = 0.21; - o sum(c) = 0.25 * -0.1 = -0.025;
    3 o^2 / 3 = 0.0625: (0.21 - 0.025 + 0.0625) / 3 = 0.0825. And the mean of many backgrounds.
    """
    rays = Rays(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([[0.8, 0.4, 0.0]]), torch.tensor([0.75]))
    color, through = torch.tensor([[0.2, 0.5, 0.1]]), torch.tensor([0.5])
    value = float(small._difference(color, through, rays))
    assert value == pytest.approx(0.0825, abs=1e-6)
    behind = torch.rand(400_000, 3, generator=torch.Generator().manual_seed(1))
    over = color + through[:, None] * behind - (rays.rgb * 0.75 + 0.25 * behind)
    assert value == pytest.approx(float(over.square().mean()), abs=2e-4)


@pytest.mark.parametrize(("step", "coarser"), [(0.05, False), (0.005, True)])
def test_long_rays_are_sampled_further_apart(monkeypatch: pytest.MonkeyPatch, step: float, coarser: bool) -> None:
    """And more of them: a step has the same number of samples; how long rays are is told at the finest distance."""
    scene = Scene(Box.cube(1.0), background=(0.0, 0.0, 0.0))
    cells = Occupancy(torch.tensor([-1.0, -1.0, -1.0]), 0.125, torch.ones(16, 16, 16, dtype=torch.uint8))
    made = trainer(RayBank(posed.frames(2, 16, 5)), scene, cells)
    made.step, made.points = step, 20_000
    asked: list[tuple[float, int, int]] = []

    def watched(way: Segments, live: Occupancy, distance: float, jitter: Tensor) -> Samples:
        found = in_cells(way, live, distance, jitter)
        asked.append((distance, len(found), len(in_cells(way, live, step, jitter)) // len(jitter)))
        return found

    monkeypatch.setattr(photometric, "in_cells", watched)
    for _ in range(40):
        made._loss()
    distance, samples, finest = asked[-1]
    assert made.per_ray == pytest.approx(finest, rel=0.1)
    if coarser:
        assert distance == pytest.approx(step * min(photometric.COARSEST, made.per_ray / photometric.LONG), rel=0.1)
        assert distance > 2 * step
        assert samples == pytest.approx(made.points, rel=0.15)
    else:
        assert distance == step


def test_the_gradient_is_that_of_the_pixels() -> None:
    """A field of two numbers: density s and grey g everywhere. A ray of length 2 has the pixel g (1 - exp(-2 s))."""

    class Uniform(RadianceField):
        def __init__(self) -> None:
            super().__init__()
            self.s = torch.nn.Parameter(torch.tensor(0.7))
            self.g = torch.nn.Parameter(torch.tensor(0.6))

        def encode(self, x: Tensor) -> Tensor:
            return x

        def density(self, latent: Tensor) -> Tensor:
            return self.s.expand(len(latent))

        def color(self, latent: Tensor, d: Tensor) -> Tensor:
            return self.g.expand(d.shape)

    scene = Scene(Box.cube(1.0), background=(0.0, 0.0, 0.0))
    cells = Occupancy(torch.tensor([-1.0, -1.0, -1.0]), 0.125, torch.ones(16, 16, 16, dtype=torch.uint8))
    made = trainer(RayBank(posed.frames(2, 16, 5)), scene, cells)
    field = Uniform()
    o, d = torch.tensor([[0.05, 0.05, 4.0]]), torch.tensor([[0.0, 0.0, -1.0]])
    rays = Rays(o, d, torch.tensor([[0.2, 0.2, 0.2]]), None)
    samples = in_cells(segments(o, d, scene, scene.box), cells, 0.01, torch.tensor([0.5]))
    assert len(samples) == 200
    color, through, weight = made._composite(field, samples, rays)
    loss = made._difference(color, through, rays)
    loss.backward()  # type: ignore[no-untyped-call]
    left = np.exp(-1.4)
    error = 0.6 * (1 - left) - 0.2
    assert float(loss.detach()) == pytest.approx(error**2, rel=1e-4)
    assert float(field.g.grad) == pytest.approx(2 * error * (1 - left), rel=1e-3)  # type: ignore[arg-type]
    assert float(field.s.grad) == pytest.approx(2 * error * 0.6 * 2 * left, rel=1e-3)  # type: ignore[arg-type]
    assert float(weight.detach().sum()) == pytest.approx(1 - left, rel=1e-4)


def ray(t1: float = 4.0) -> Segments:
    return Segments(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 0.0]]), torch.zeros(1), torch.tensor([t1]))


def test_samples_of_two_passes() -> None:
    first, t = stratified(ray(), torch.full((1, 4), 0.5))
    assert torch.equal(first.x[:, 0], torch.tensor([0.5, 1.5, 2.5, 3.5]))
    assert torch.equal(first.dt, torch.tensor([1.0, 1.0, 1.0, 0.5]))
    # All the weight on the third: midpoints 1, 2, 3, so everything is drawn from 2 to 3.
    more = importance(ray(), t, torch.tensor([[0.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.25, 0.75]]))
    assert torch.allclose(more.x[:, 0], torch.tensor([0.5, 1.5, 2.25, 2.5, 2.75, 3.5]), atol=1e-3)
    assert float(more.dt.sum()) == pytest.approx(3.5)


def test_what_light_does_not_reach() -> None:
    samples = Samples(torch.zeros(5, 3), torch.ones(5), torch.tensor([0, 3, 3, 5]), torch.tensor([0, 0, 0, 2, 2]))
    keep = reached(samples, torch.tensor([0.4, 0.5999, 0.0001, 0.9, 0.1]))
    assert keep.tolist() == [True, True, False, True, True]
    kept = samples.kept(keep)
    assert kept.offsets.tolist() == [0, 2, 2, 4]
    assert kept.ray.tolist() == [0, 0, 2, 2]


def test_warped_rays_run_from_the_near_plane_to_infinity() -> None:
    scene = Scene(Box((-2, -2, -1), (2, 2, 1)), near=0.0, far=1.0, ray_space=RaySpace("ndc", 8, 6, 4.0, 1.0))
    way = segments(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -1.0]]), scene, scene.box)
    assert way.o[0].tolist() == [0.0, 0.0, -1.0]
    assert float(way.d[0, 2]) == 1.0
    assert (float(way.t0), float(way.t1)) == (0.0, 2.0)


def test_cells_that_stay_empty_are_left_out(small: Photometric) -> None:
    scene = AnalyticScene()
    whole = Occupancy(torch.tensor([-1.0, -1.0, -1.0]), 0.125, torch.ones(16, 16, 16, dtype=torch.uint8))
    made = trainer(small.bank, scene.scene, whole)
    made.student = scene
    for _ in range(3):
        made.sweep()
    dense = scene.density(whole.centers()) > 5.0
    kept = made.live.contains(whole.centers())
    assert bool(kept[dense].all())
    assert int(kept.sum()) < 0.4 * len(kept)


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(**options: Any) -> str:
    values: dict[str, Any] = {"dataset": posed.dataset(3, 16), "to": "ngp", "preset": "fast", "steps": FEW, **options}
    with pytest.raises((InputError, RequestError, UsageError)) as error:
        training.train(**values)
    return str(error.value)


def test_bad_requests_are_one_line(tmp_path: Path) -> None:
    assert "splits: train (3), test (3)" in refused(split="val")
    assert "unknown" in refused(sampling="cells")
    assert "near 3 is not before far 2" in refused(near=3.0, far=2.0)
    assert "are not a replay" in refused(steps="train-1=many")
    assert "levels" in refused(sets={"levels": -1})
    assert "start without --resume" in refused(resume=True, out=tmp_path / "none.safetensors")
    assert "--bounds" in refused(bounds=Box.cube(0.1, (30.0, 0.0, 0.0)))


def test_pictures_of_nothing_but_background_are_refused() -> None:
    def black(camera: Camera) -> Any:
        return lambda: np.zeros((camera.height, camera.width, 4), np.uint8)

    data = posed.dataset(3, 16)
    frames = tuple(dataclasses.replace(f, read=black(f.camera)) for f in data.split("train"))
    assert "nothing but background" in refused(dataset=dataclasses.replace(data, splits={"train": frames}))


def test_a_loss_that_is_no_number_ends_the_run(small: Photometric) -> None:
    made = trainer(small.bank, small.scene, small.cells)
    with torch.no_grad():
        next(iter(made.student.parameters())).fill_(torch.nan)
    with pytest.raises(RequestError, match=r"not a number|NaN"):
        made.run("train", 1.0, parts=1, steps={"train": (16, 16)})
