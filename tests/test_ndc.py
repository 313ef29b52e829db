"""Forward-facing scenes in normalised device coordinates: what is asked of a teacher, and the road to a student."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pvdconvert.distill.label import label
from pvdconvert.errors import InputError
from pvdconvert.field import FunctionField
from pvdconvert.pipeline import convert
from pvdconvert.prepare import prepare
from pvdconvert.progress import Silent
from pvdconvert.render.trace import ndc_rays
from pvdconvert.scene import Box, RaySpace, Scene

SPACE = RaySpace("ndc", width=200.0, height=150.0, focal=160.0, near=1.0)
SCENE = Scene(
    Box((-1.5, -1.67, -1.0), (1.5, 1.67, 1.0)), background=(0.0, 0.0, 0.0), near=0.0, far=1.0, ray_space=SPACE
)


def density(x: Tensor) -> Tensor:
    """A wall across the view, with a hole in its middle, in NDC."""
    wall = ((x[:, 2] - 0.2).abs() < 0.08) & (x[:, :2].abs().amax(1) > 0.3)
    return torch.where(wall, 80.0, 0.0)


def color(x: Tensor, d: Tensor) -> Tensor:
    return 0.5 + 0.4 * torch.stack([torch.sin(4 * x[:, 0]), torch.sin(4 * x[:, 1]), d[:, 2]], 1)


def test_colours_are_asked_from_ahead_only() -> None:
    ready = prepare(FunctionField(density, color), SCENE, seconds=0.5)
    store, _ = label(
        ready.field,
        SCENE,
        ready.occupancy,
        step=ready.step,
        seconds=0.0,
        max_samples=1 << 20,
        batches=1,
        progress=Silent(),
        device=torch.device("cpu"),
    )
    assert len(store.many) > 1000
    assert (store.d[:, 2] < 0).all()
    own = store.d[store.ray_of()[store.many]]
    aligned = (store.many_d * own[:, None]).sum(-1)
    assert (aligned > 0.93).float().mean() > 0.85  # within about 20 degrees
    assert (store.many_d[..., 2] < 0).float().mean() > 0.999


def test_the_warp_needs_its_numbers() -> None:
    with pytest.raises(InputError, match="--extra width="):
        ndc_rays(torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -1.0]]), RaySpace("ndc"))


@pytest.mark.slow
def test_a_forward_facing_scene_converts() -> None:
    steps = "scout=1;labels=1;density=60/60;color=150/150;render=60/60"
    report = convert((density, color), "ngp", scene=SCENE, steps=steps, preset="fast", sets={"log2_table": 12})
    assert report.fidelity is not None
    assert report.fidelity["psnr"] > 20
