"""nerf-pytorch files of ours: what the program's own code would build loads them, and they come back bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pvdconvert.errors import RequestError
from pvdconvert.loading import open_field
from pvdconvert.pipeline import convert
from pvdconvert.plugin import ArrayTensor, Budget, Parts, ReadOptions, TeacherFacts
from pvdconvert.registry import default
from pvdconvert.scene import Box, Scene
from pvdconvert.writing import write_checked
from pvdconvert_plugins.nerf_spec import NerfOptions
from tests.test_formats_nerf_pytorch import Net, points, read, save

SCENE = Scene(Box((-1.0, -2.0, -0.5), (1.0, 2.0, 0.5)), background=(0.0, 0.5, 1.0), near=0.5, far=7.0)


def field_parts(changes: dict[str, Any] | None = None, seed: int = 0) -> Parts:
    """A field of random weights; the program's own shapes where ``changes`` says nothing else."""
    config: dict[str, Any] = {"width": 32, "bottleneck_width": 32, "direction_layers": [16], **(changes or {})}
    rng = np.random.default_rng(seed)
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in NerfOptions.from_config(config).shapes().items()}
    return Parts("nerf", config, {k: ArrayTensor(a) for k, a in arrays.items()}, SCENE, {"step": 4999})


class Program(nn.Module):
    """The layers that the program builds from its settings, D, W and whether it uses view directions."""

    def __init__(self, depth: int, width: int, views: bool, octaves: tuple[int, int] = (10, 4)) -> None:
        super().__init__()
        wide, view_wide = (3 + 6 * k for k in octaves)
        hidden = [nn.Linear(width + wide if i == 4 else width, width) for i in range(depth - 1)]
        self.pts_linears = nn.ModuleList([nn.Linear(wide, width), *hidden])
        self.views_linears = nn.ModuleList([nn.Linear(width + view_wide * views, width // 2)])
        if views:
            self.feature_linear, self.alpha_linear = nn.Linear(width, width), nn.Linear(width, 1)
            self.rgb_linear = nn.Linear(width // 2, 3)
        else:
            self.output_linear = nn.Linear(width, 5)


NO_VIEWS: dict[str, Any] = {
    "direction_encoding": "none",
    "direction_frequencies": 0,
    "bottleneck_width": None,
    "direction_layers": [],
}
FIELDS: dict[str, tuple[dict[str, Any], tuple[int, int, bool]]] = {
    "one network": ({}, (8, 32, True)),
    "two networks": ({"has_coarse": True}, (8, 32, True)),
    "no view directions": ({**NO_VIEWS, "has_coarse": True}, (8, 32, False)),
    "four layers": ({"depth": 4, "skips": []}, (4, 32, True)),
    "a smaller coarse network": (
        {
            "has_coarse": True,
            "coarse": {"depth": 3, "skips": [], "width": 8, "bottleneck_width": 8, "direction_layers": [4]},
        },
        (3, 8, True),
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_it_comes_back_and_loads_as_the_program_loads(tmp_path: Path, name: str) -> None:
    changes, (depth, width, views) = FIELDS[name]
    parts = field_parts(changes)
    path = tmp_path / "005000.tar"
    write_checked(parts, path, "nerf-pytorch", default())
    back = read(path)
    assert back.tensors.keys() == parts.tensors.keys()
    for key, tensor in parts.tensors.items():
        np.testing.assert_array_equal(back.tensors[key].numpy(), tensor.numpy())
    assert NerfOptions.from_config(back.config) == NerfOptions.from_config(parts.config)
    assert back.scene == SCENE
    assert back.provenance["step"] == 4999

    value = torch.load(path, weights_only=True)
    coarse = Program(depth, width, views)
    fine = Program(8, 32, views) if "coarse" in changes else Program(depth, width, views)
    optimizer = torch.optim.Adam([*coarse.parameters(), *fine.parameters()], lr=5e-4)
    optimizer.load_state_dict(value["optimizer_state_dict"])
    coarse.load_state_dict(value["network_fn_state_dict"])
    fine.load_state_dict(value["network_fine_state_dict"])
    assert value["global_step"] == 4999


def test_a_file_of_the_program_is_only_laid_out_anew(tmp_path: Path) -> None:
    coarse, fine = (Net(8, 32, 4, (10, 4), 1) for _ in range(2))
    source = save(tmp_path / "a.tar", coarse, fine)
    (tmp_path / "args.txt").write_text("dataset_type = blender\nwhite_bkgd = True\n")
    report = convert(source, "nerf", as_="nerf-pytorch", out=tmp_path / "b.tar")
    assert report.plan["kind"] == "transcode"
    x, d = points()
    for a, b in zip(open_field(source).field(x, d), open_field(tmp_path / "b.tar").field(x, d)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    native = tmp_path / "c.safetensors"
    convert(tmp_path / "b.tar", "nerf", out=native)
    convert(native, "nerf", as_="nerf-pytorch", out=tmp_path / "d.tar")
    value, first = (torch.load(tmp_path / n, weights_only=True) for n in ("d.tar", "a.tar"))
    for key in ("network_fn_state_dict", "network_fine_state_dict"):
        assert value[key].keys() == first[key].keys()
        assert all(torch.equal(value[key][k], t) for k, t in first[key].items())


def test_what_the_user_says_of_the_scene_wins(tmp_path: Path) -> None:
    default().format("nerf-pytorch").write(field_parts(), tmp_path / "a.tar")
    given = ReadOptions(background=(1.0, 0.0, 0.0), far=9.0)
    scene = read(tmp_path / "a.tar", given).scene
    assert scene == dataclasses.replace(SCENE, background=(1.0, 0.0, 0.0), far=9.0)
    other = tmp_path / "other.txt"
    other.write_text("dataset_type = blender\n")
    assert read(tmp_path / "a.tar", ReadOptions(config=other)).scene.far == 6.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"density_activation": "softplus"}, "density_activation = relu, this field has 'softplus'"),
        ({"direction_encoding": "sh"}, "direction_encoding = frequency"),
        ({"first_activation": False}, "first_activation = True"),
        ({"box": {"min": [-1, -1, -1], "max": [1, 1, 1]}}, "box = None"),
        ({"skips": [2]}, r"skips = \[4\], this field has \[2\]"),
        ({"depth": 5, "skips": []}, "trunk of 5 layers"),
        ({"direction_layers": [20]}, r"direction_layers = \[16\]"),
        ({"bottleneck_width": 16}, "bottleneck_width = 32"),
    ],
)
def test_what_the_program_does_not_know_is_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        default().format("nerf-pytorch").write(field_parts(changes), tmp_path / "a.tar")
    assert "a.tar: nerf-pytorch" in str(caught.value)
    assert not (tmp_path / "a.tar").exists()


# ------------------------------------------------------------------------------------------------------- students


FACTS = TeacherFacts(SCENE, Box((-1.0, -0.5, -0.25), (1.0, 0.5, 0.75)), 1000, 500, 0.1)


def plan(overrides: dict[str, Any], budget: Budget | None = None) -> dict[str, Any]:
    limits = default().format("nerf-pytorch").limits("nerf")
    return default().architecture("nerf").plan(FACTS, budget or Budget(), limits, overrides)


def test_students_have_the_programs_shape() -> None:
    config = plan({})
    assert (config["depth"], config["width"], config["skips"], config["masked"]) == (8, 256, [4], False)
    narrow = plan({"width": 64})
    assert (narrow["bottleneck_width"], narrow["direction_layers"]) == (64, [32])
    shallow = plan({"depth": 4})
    assert shallow["skips"] == []
    small = plan({}, Budget(max_mb=0.2))
    assert (small["depth"], small["bottleneck_width"]) == (4, small["width"])
    with pytest.raises(RequestError, match="density_activation"):
        plan({"density_activation": "exp"})


@pytest.mark.slow
def test_a_student_without_a_mask_learns_that_empty_is_empty(tmp_path: Path) -> None:
    """Distilled from two functions, a ball amid the box. Beside it and beyond the box, the program draws nothing."""

    def density(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x.norm(dim=1) < 0.4, 30.0, 0.0)

    def color(x: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, 0.3)

    report = convert(
        (density, color),
        "nerf",
        as_="nerf-pytorch",
        out=tmp_path / "ball.tar",
        box=Box.cube(1.0),
        sets={"depth": 3, "width": 32, "position_frequencies": 3},
        steps="scout=1;labels=1;density=300/300;color=60/60;render=60/60",
    )
    assert report.fidelity is not None
    value = torch.load(tmp_path / "ball.tar", weights_only=True)["network_fine_state_dict"]
    net = Program(3, 32, True, (3, 4))
    net.load_state_dict(value)

    def sigma(x: torch.Tensor) -> torch.Tensor:
        h = torch.cat([x, *[f(2.0**k * x) for k in range(3) for f in (torch.sin, torch.cos)]], -1)
        for layer in net.pts_linears:
            h = torch.relu(layer(h))
        return torch.relu(net.alpha_linear(h))[:, 0]

    with torch.no_grad():
        x = (torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1) * 1.4
        far = x.norm(dim=1) > 0.75
        assert (sigma(x[far]) > 0.05).float().mean() < 0.01
        assert sigma(x[~far] * 0.4).mean() > 5


def test_a_student_without_a_mask_is_asked_around_its_box_only_while_it_learns() -> None:
    plugin = default().architecture("nerf")
    field = plugin.build(plan({"depth": 3, "width": 32}), SCENE, 0)
    x = torch.tensor([[1.3, 0.0, 0.0], [0.0, 2.5, 0.0], [0.0, 0.0, -0.7]])
    with torch.no_grad():
        assert (field.density(field.encode(x)) == 0).all()
        assert (field.train().density(field.encode(x)) > 0).all()
        assert (field.eval().density(field.encode(x)) == 0).all()
