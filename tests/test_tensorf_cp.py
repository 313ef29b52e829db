"""The tensorf-cp architecture: formulas, files, plans, projection, fitting. What it shares is in test_tensorf.py."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pvdconvert.errors import InputError, RequestError
from pvdconvert.plugin import Budget, Config, Limits, TeacherFacts, option_help
from pvdconvert.registry import default
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.tensorf_cp import TensorfCp
from pvdconvert_plugins.tensorf_cp_spec import TensorfCpOptions, megabytes, parse

SCENE = Scene(Box((-1.0, -1.2, -0.8), (1.0, 1.0, 1.1)))
FACTS = TeacherFacts(SCENE, Box((-0.5, -0.6, -0.4), (0.6, 0.7, 1.0)), 1000, 500, 0.02)
SMALL: Config = {"resolution": [9, 8, 7], "density_rank": 5, "color_rank": 6, "mlp_width": 16, "density_shift": 0.0}


def points(count: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    low, size = torch.tensor(SCENE.box.min), torch.tensor(SCENE.box.size)
    x = low + size * (torch.rand(count, 3, generator=g) * 1.1 - 0.05)
    return x, F.normalize(torch.randn(count, 4, 3, generator=g), dim=-1)


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_the_field_is_the_textbook(activation: str) -> None:
    """Layouts 3.3 for CP and MLP_Fea, by grid_sample in float64, from the tensors of a file."""
    config = {**SMALL, "density_activation": activation}
    field = TensorfCp().build(config, SCENE, 3)
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(2.0).add_(0.1)
    held, tensors = TensorfCp().save(field)
    w = {k: v.double() for k, v in tensors.items()}
    x, d = points(400)
    u = (x.double() - torch.tensor(SCENE.box.min).double()) / torch.tensor(SCENE.box.size).double() * 2 - 1

    def products(name: str) -> Tensor:
        out: Tensor | float = 1.0
        for i, axis in enumerate((2, 1, 0)):
            at = torch.stack([torch.zeros_like(u[:, axis]), u[:, axis]], -1)[None, :, None]
            out = out * F.grid_sample(w[f"{name}_line.{i}"], at, align_corners=True)[0, :, :, 0]
        assert isinstance(out, Tensor)
        return out.t()

    raw = products("density").sum(1)
    sigma = 25.0 * (F.softplus(raw) if activation == "softplus" else raw.exp())
    sigma = torch.where((u.abs() <= 1).all(1), sigma, 0.0)
    torch.testing.assert_close(field.density(x).double(), sigma, rtol=2e-4, atol=1e-5)
    app = products("app") @ w["basis_mat.weight"].t()

    def waves(v: Tensor) -> list[Tensor]:
        phase = torch.stack([v, 2 * v], -1).flatten(1)
        return [phase.sin(), phase.cos()]

    rgb = field.color(x, d)
    for k in range(4):
        v = d[:, k].double()
        h = torch.cat([app, v, *waves(app), *waves(v)], 1)
        for j in (0, 2, 4):
            h = F.linear(h, w[f"renderModule.mlp.{j}.weight"], w[f"renderModule.mlp.{j}.bias"])
            h = F.relu(h) if j < 4 else h.sigmoid()
        torch.testing.assert_close(rgb[sigma > 0, k].double(), h[sigma > 0], rtol=0, atol=3e-5)
    assert held["density_rank"] == 5


def test_load_names_what_is_missing_surplus_or_misshapen() -> None:
    plugin = TensorfCp()
    config, tensors = plugin.save(plugin.build(SMALL, SCENE, 0))
    with pytest.raises(InputError, match=r"tensorf-cp: tensor 'app_line.1' is missing"):
        plugin.load(config, {k: v for k, v in tensors.items() if k != "app_line.1"}, SCENE)
    with pytest.raises(InputError, match=r"'app_plane.0' is not part"):
        plugin.load(config, {**tensors, "app_plane.0": torch.zeros(1)}, SCENE)
    with pytest.raises(InputError, match=r"'density_line.2' has shape \[2\]"):
        plugin.load(config, {**tensors, "density_line.2": torch.zeros(2)}, SCENE)


@pytest.mark.parametrize(("key", "value"), [("density_rank", 0), ("color_rank", "x"), ("density_ranks", [1, 1, 1])])
def test_impossible_configurations_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"tensorf-cp: .*{key}"):
        parse({**SMALL, key: value})
    with pytest.raises(RequestError, match=key):
        TensorfCp().plan(FACTS, Budget(), Limits(), {key: value})


def test_the_spec_is_installed_and_every_option_has_help() -> None:
    assert default().architectures()["tensorf-cp"].origin.builtin
    assert isinstance(default().architecture("tensorf-cp"), TensorfCp)
    assert all(help_ for _, _, help_ in option_help(TensorfCpOptions))


@torch.no_grad()
def test_plans_grow_with_the_preset_and_start_nearly_empty() -> None:
    sizes = []
    for preset in ("fast", "balanced", "best"):
        options = parse(TensorfCp().plan(FACTS, Budget(preset), Limits(), {}))
        sizes.append(megabytes(options))
        field = TensorfCp().build(dataclasses.asdict(options), SCENE, 0)
        tensors = TensorfCp().save(field)[1]
        assert 4e-6 * sum(t.numel() for t in tensors.values()) == pytest.approx(sizes[-1])
        x, _ = points(200)
        thickness = field.density(x)[field.inside(x, field.unit(x))] * field.box.longest / max(options.resolution)
        assert 0.0 < float(thickness.min()) < float(thickness.max()) < 0.1
    assert sizes == sorted(sizes)


def test_plan_keeps_overrides_limits_and_sizes() -> None:
    plugin = TensorfCp()
    assert max(plugin.plan(FACTS, Budget(), Limits(), {"resolution": 65})["resolution"]) == 65
    fixed = {"view_encoding": "frequency", "mlp_layers": 3}
    usual = {"density_activation": "softplus", "density_scale": 25.0}
    limited = plugin.plan(FACTS, Budget(), Limits(fixed, usual), {"density_scale": 10.0})
    assert {k: limited[k] for k in fixed} == fixed
    assert (limited["density_activation"], limited["density_scale"]) == ("softplus", 10.0)
    assert limited["density_shift"] > -10.0  # such that gradients reach the empty
    small = parse(plugin.plan(FACTS, Budget(max_mb=0.8), Limits(), {}))
    assert 0.7 < megabytes(small) <= 0.8
    with pytest.raises(RequestError, match="max-mb"):
        plugin.plan(FACTS, Budget(max_mb=0.01), Limits(), {})


def test_upsampling_keeps_the_field() -> None:
    field = TensorfCp().build(SMALL, SCENE, 2)
    x, d = points(300)
    density, color = field.density(x), field.color(x, d)
    field.upsample((17, 15, 13))  # the finer grid nests in the coarser
    torch.testing.assert_close(field.density(x), density, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(field.color(x, d), color, rtol=1e-4, atol=1e-5)
    config, tensors = TensorfCp().save(field)
    assert config["resolution"] == [17, 15, 13]
    assert tensors["density_line.0"].shape == (1, 5, 13, 1)
