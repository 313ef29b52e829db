"""The ngp architecture: its function, exact round trips, plans, refusals, and that it learns."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pvdconvert.errors import InputError, RequestError, UsageError
from pvdconvert.field import Stage
from pvdconvert.kernels.hashgrid import hash_encode_torch
from pvdconvert.nn.clipped import clipped_exp
from pvdconvert.nn.mlp import INFERENCE_ROWS, MLP
from pvdconvert.nn.sh import sh_basis
from pvdconvert.plugin import Architecture, Budget, Limits, TeacherFacts, option_help
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.ngp import Ngp, NgpField
from pvdconvert_plugins.ngp_spec import MAX_LOG_DENSITY, SPEC, NgpOptions

SCENE = Scene(box=Box((-1.0, -1.5, -2.0), (1.0, 0.5, 2.0)))
SMALL = {"levels": 4, "log2_table": 10, "base_resolution": 4, "per_level_scale": 1.8, "hidden": 16}
FACTS = TeacherFacts(
    scene=SCENE,
    occupied_box=Box((-0.5, -0.6, -0.7), (0.5, 0.6, 0.7)),
    occupied_cells=9000,
    surface_cells=3000,
    cell=4.0 / 128,
)


def small(seed: int = 0, **changes: Any) -> NgpField:
    """A small field whose table is large enough to show."""
    field = Ngp().build(SMALL | changes, SCENE, seed)
    with torch.no_grad():
        field.encoder.embeddings.mul_(2e4)
        for name, p in field.named_parameters():
            if name.endswith(".bias"):
                p.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    return field


def points(count: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Positions in the scene's box (times ``spread``), and two unit directions each."""
    g = torch.Generator().manual_seed(5)
    low, size = torch.tensor(SCENE.box.min), torch.tensor(SCENE.box.size)
    center = torch.tensor(SCENE.box.center)
    x = (low + torch.rand(count, 3, generator=g) * size - center) * spread + center
    return x, nn.functional.normalize(torch.randn(count, 2, 3, generator=g), dim=-1)


def truth(field: NgpField, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Density and colour in float64 from the formulas of layouts 1.4 and 2.1."""
    _, tensors = Ngp().save(field)
    w = {k: v.double() for k, v in tensors.items()}
    o = field.options
    box = SCENE.box if o.box is None else Box((*o.box[0],), (*o.box[1],))  # type: ignore[arg-type]
    low, size = torch.tensor(box.min).double(), torch.tensor(box.size).double()
    h = hash_encode_torch((x.double() - low) / size, w["encoder.embeddings"], field.encoder.spec)
    for k in range(o.density_layers + 1):
        h = (h.relu() if k else h) @ w[f"sigma_net.{k}.weight"].T + w.get(f"sigma_net.{k}.bias", torch.zeros(1))
    half = o.view_input == "half"
    sh = sh_basis((d.double() + 1) / 2 if half else d.double(), o.sh_bands)
    if half:  # nerfstudio's signs are all plus: its first row beyond the constant is +0.4886 y
        sh = sh * torch.tensor([-1.0 if i % 2 else 1.0 for i in range(o.sh_bands**2)])
    geo = (h if o.color_input == "h+sh" else h[:, 1:])[:, None, :].expand(-1, d.shape[1], -1)
    c = torch.cat([geo, sh] if o.color_input == "h+sh" else [sh, geo], dim=-1)
    for k in range(o.color_layers + 1):
        c = (c.relu() if k else c) @ w[f"color_net.{k}.weight"].T + w.get(f"color_net.{k}.bias", torch.zeros(1))
    raw = h[:, 0] if o.density_clip is None else h[:, 0].clamp(*o.density_clip)
    return o.density_scale * raw.exp(), c.exp() if o.color_activation == "exp" else c.sigmoid()


def test_the_plugin_keeps_the_contract() -> None:
    assert isinstance(Ngp(), Architecture)
    assert SPEC.name == "ngp"
    assert all(text for _, _, text in option_help(NgpOptions))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"index_rule": "tcnn", "color_input": "h+sh", "density_scale": 0.33, "interpolation": "smoothstep"},
        {"color_activation": "exp", "density_layers": 2, "color_layers": 1, "color_hidden": 24, "features": 4},
        {"density_layers": 0, "color_layers": 0, "geo_features": 3, "sh_bands": 2},
        {"box": [[-0.9, -1.4, -1.9], [0.9, 0.4, 1.9]]},
        {"density_clip": [-0.2, 0.3]},
        {"index_rule": "nerfstudio", "bias": True, "view_input": "half", "density_scale": 10.0},
    ],
)
def test_density_and_colour_follow_the_formulas(changes: dict[str, Any]) -> None:
    field = small(**changes)
    x, d = points(300, spread=0.85)
    with torch.no_grad():
        latent = field.encode(x)
        sigma, rgb = field.density(latent), field.color(latent, d)
    expected_sigma, expected_rgb = truth(field, x, d)
    assert rgb.shape == (300, 2, 3)
    assert expected_sigma.std() > 0.05
    assert expected_rgb.std() > 0.01
    torch.testing.assert_close(sigma.double(), expected_sigma, atol=1e-4, rtol=2e-4)
    torch.testing.assert_close(rgb.double(), expected_rgb, atol=1e-4, rtol=1e-4)


def test_density_outside_of_the_box_is_exactly_zero() -> None:
    for rule in ("tcnn", "torch-ngp"):
        field = small(index_rule=rule)
        x, _ = points(500, spread=2.0)
        inside = torch.tensor(
            [all(a <= v <= b for a, v, b in zip(SCENE.box.min, p, SCENE.box.max)) for p in x.tolist()]
        )
        assert 0 < int(inside.sum()) < 500
        sigma = field.density(field.encode(x))
        assert (sigma[~inside] == 0).all()
        assert (sigma[inside] > 0).all()


def test_a_mask_restricts_the_field_and_travels_with_it() -> None:
    grid = torch.zeros(4, 4, 8, dtype=torch.uint8)
    grid[1, 2, 3] = grid[2, 2, 5] = 1
    occupancy = Occupancy(torch.tensor(SCENE.box.min), 0.5, grid)
    field = small()
    field.restrict(occupancy)
    x, d = points(3000)
    sigma = field.density(field.encode(x))
    assert torch.equal(sigma > 0, occupancy.contains(x))
    assert (sigma > 0).any()
    config, tensors = Ngp().save(field)
    again = Ngp().load(json.loads(json.dumps(config)), tensors, SCENE)
    with torch.no_grad():
        assert torch.equal(again(x, d[:, 0])[0], sigma)
    del tensors["mask.bits"]
    with pytest.raises(InputError, match=r"mask\.bits"):
        Ngp().load(config, tensors, SCENE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"index_rule": "tcnn", "color_input": "h+sh", "features": 4, "density_layers": 2},
        {"index_rule": "nerfstudio", "bias": True, "density_clip": [-2.0, 7.0]},
    ],
)
def test_round_trip_is_exact(changes: dict[str, Any]) -> None:
    field = small(**changes)
    config, tensors = Ngp().save(field)
    assert config == json.loads(json.dumps(config))
    again = Ngp().load(config, tensors, SCENE)
    config2, tensors2 = Ngp().save(again)
    assert config2 == config
    assert list(tensors2) == list(tensors)
    assert all(torch.equal(tensors[k], tensors2[k]) for k in tensors)
    x, d = points(100)
    for a, b in zip(field(x, d[:, 0]), again(x, d[:, 0])):
        assert torch.equal(a, b)


def test_tensor_names_are_those_of_torch_ngp() -> None:
    options = NgpOptions(log2_table=8)
    _, tensors = Ngp().save(Ngp().build(dataclasses.asdict(options), SCENE, 0))
    shapes = {name: tuple(value.shape) for name, value in tensors.items() if name != "encoder.embeddings"}
    assert shapes == {
        "sigma_net.0.weight": (64, 32),
        "sigma_net.1.weight": (16, 64),
        "color_net.0.weight": (64, 31),
        "color_net.1.weight": (64, 64),
        "color_net.2.weight": (3, 64),
    }
    assert tensors["encoder.embeddings"].shape == (16 * 256, 2)


def test_stored_offsets_are_kept() -> None:
    # Not rounded to multiples of 8: a torch-ngp file from before 2022-06-06.
    offsets = [0, 125, 125 + 729]
    field = Ngp().build(SMALL | {"levels": 2, "per_level_scale": 2.0, "offsets": offsets}, SCENE, 0)
    assert field.encoder.embeddings.shape == (854, 2)
    assert Ngp().save(field)[0]["offsets"] == offsets


def test_half_precision_weights_load_exactly() -> None:
    config, tensors = Ngp().save(small())
    halves = {k: v.half() for k, v in tensors.items()}
    field = Ngp().load(config, halves, SCENE)
    assert torch.equal(field.encoder.embeddings, halves["encoder.embeddings"].float())


def test_builds_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = Ngp().save(small(3))[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b, c = Ngp().save(small(3))[1], Ngp().save(small(4))[1]
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a)
    fresh = Ngp().build(SMALL, SCENE, 0).encoder.embeddings
    assert 0.9e-4 < float(fresh.detach().abs().max()) <= 1e-4


def test_density_never_overflows_and_always_pulls_back() -> None:
    field = small(density_scale=2.0)
    h = torch.tensor([-1e4, -80.0, -20.0, 0.0, 10.0, 20.0, 80.0, 1e4])
    latent = torch.cat([h[:, None], torch.zeros(8, 15), torch.ones(8, 1)], dim=-1).requires_grad_()
    sigma = field.density(latent)
    assert torch.isfinite(sigma).all()
    torch.testing.assert_close(sigma.double(), 2 * torch.exp(h.double().clamp(max=MAX_LOG_DENSITY)), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(sigma.sum(), latent)
    torch.testing.assert_close(grad[:, 0].double(), 2 * torch.exp(h.double().clamp(-15, 15)), rtol=1e-5, atol=0)
    assert (grad[:, 0] > 0).all()
    # Where a point is outside, not even a broken log-density shows.
    broken = torch.full((1, 17), float("inf"))
    broken[0, -1] = 0
    assert float(field.density(broken)) == 0.0


def test_features_are_pvds_tap() -> None:
    field = small()
    x, d = points(50)
    latent = field.encode(x)
    tap = Ngp().forward_stage(field, Stage.FEATURES, x, d)
    assert tap is not None
    assert tap.shape == (50, field.feature_width or 0) == (50, 16)
    torch.testing.assert_close(tap[:, 0].exp(), field.density(latent))


def test_answers_in_chunks_are_those_in_one_piece() -> None:
    field = small()
    x, d = points(INFERENCE_ROWS + 17)
    whole = field(x, d[:, 0])
    with torch.no_grad():
        parts = field(x, d[:, 0])
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    sigma, rgb = field(x[:0], d[:0, 0])
    assert sigma.shape == (0,)
    assert rgb.shape == (0, 3)


def test_mlp_against_numpy_and_its_refusals() -> None:
    net = MLP([3, 8, 8, 2], bias=True, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 5, 3)
    h = x.numpy().astype(np.float64)
    for k, layer in enumerate(net.layers):
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.bias.uniform_(-1, 1)
        h = (np.maximum(h, 0) if k else h) @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    np.testing.assert_allclose(net(x).detach().numpy(), h, atol=1e-5)
    with torch.no_grad():
        long = torch.randn(2, INFERENCE_ROWS, 3)
        assert net(long).shape == (2, INFERENCE_ROWS, 2)
        torch.testing.assert_close(net(long)[1, -3:], net(long[1, -3:]))
    for widths in ([3], [3, 0, 2]):
        with pytest.raises(ValueError, match="at least two widths"):
            MLP(widths, bias=False)


def test_plans_grow_with_the_preset_and_follow_the_occupied_box() -> None:
    fields = []
    for preset in ("fast", "balanced", "best"):
        config = Ngp().plan(FACTS, Budget(preset=preset), Limits(), {})
        assert config["box"] == [[-0.5, -0.6, -0.7], [0.5, 0.6, 0.7]]
        assert config["index_rule"] == "torch-ngp"
        fields.append(Ngp().build(config, SCENE, 0))
    tables = [f.encoder.spec.entries for f in fields]
    finest = [f.encoder.spec.levels[-1].resolution for f in fields]
    assert tables == sorted(set(tables))
    assert finest == sorted(set(finest))
    hurried = Ngp().plan(FACTS, Budget(preset="best", seconds=60), Limits(), {})
    assert hurried["log2_table"] == Ngp().plan(FACTS, Budget(preset="fast"), Limits(), {})["log2_table"]


@pytest.mark.parametrize("megabytes", [0.5, 2.0, 20.0])
def test_plans_honour_a_size_limit(megabytes: float) -> None:
    config = Ngp().plan(FACTS, Budget(max_mb=megabytes), Limits(), {})
    field = Ngp().build(config, SCENE, 0)
    field.restrict(Occupancy(torch.tensor(SCENE.box.min), FACTS.cell, torch.ones(64, 64, 128, dtype=torch.uint8)))
    size = sum(v.numel() * v.element_size() for v in Ngp().save(field)[1].values()) / 1e6
    assert 0.4 * megabytes < size <= megabytes


def test_overrides_always_win() -> None:
    asked = {"levels": 8, "log2_table": 12, "hidden": 32, "finest_resolution": 300, "index_rule": "tcnn"}
    config = Ngp().plan(FACTS, Budget(max_mb=5), Limits({"features": 4, "levels": 8}), asked)
    field = Ngp().build(config, SCENE, 0)
    assert (config["levels"], config["log2_table"], config["hidden"], config["features"]) == (8, 12, 32, 4)
    assert field.encoder.spec.index_rule == "tcnn"
    assert abs(field.encoder.spec.levels[-1].resolution - 300) <= 1
    exact = Ngp().plan(FACTS, Budget(), Limits(), {"per_level_scale": 1.5})
    assert exact["per_level_scale"] == 1.5


@pytest.mark.parametrize(
    ("budget", "limits", "overrides", "error", "message"),
    [
        (Budget(max_mb=0.01), {}, {}, RequestError, "--max-mb"),
        (Budget(max_mb=1.0), {}, {"log2_table": 19}, RequestError, "--max-mb"),
        (Budget(), {"levels": 16}, {"levels": 8}, RequestError, "levels=8"),
        (Budget(), {}, {"finest_resolution": 256, "per_level_scale": 1.4}, RequestError, "finest_resolution"),
        (Budget(), {}, {"tables": 3}, UsageError, "tables"),
        (Budget(), {}, {"levels": 1000}, UsageError, "levels"),
    ],
)
def test_plans_that_cannot_be(
    budget: Budget, limits: dict[str, Any], overrides: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Ngp().plan(FACTS, budget, Limits(limits), overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "'depth'"),
        ({"index_rule": "other"}, "index_rule"),
        ({"interpolation": "cubic"}, "interpolation"),
        ({"color_input": "geo"}, "color_input"),
        ({"density_activation": "relu"}, "density_activation"),
        ({"color_activation": "none"}, "color_activation"),
        ({"sh_bands": 9}, "sh_bands"),
        ({"density_scale": -1}, "density_scale"),
        ({"hidden": 0}, "hidden"),
        ({"hidden": "wide"}, "'hidden' = 'wide'"),
        ({"levels": None}, "'levels'"),
        ({"levels": 0}, "levels"),
        ({"offsets": [0, 8]}, "offsets"),
        ({"offsets": 5}, "'offsets'"),
        ({"box": [1, 2]}, "'box'"),
        ({"box": [[0, 0, 0], [1, 0, 1]]}, "empty"),
        ({"density_clip": [7, -2]}, "density_clip"),
        ({"density_clip": [1]}, "density_clip"),
        ({"bias": "some"}, "bias"),
        ({"view_input": "full"}, "view_input"),
        ({"view_input": "half", "sh_bands": 5}, "at most 4 bands"),
    ],
)
def test_bad_configurations_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Ngp().build(SMALL | changes, SCENE, 0)
    assert "\n" not in str(caught.value)


def test_bad_tensors_are_named() -> None:
    config, tensors = Ngp().save(small())
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in tensors.items() if k != "sigma_net.1.weight"}, r"'sigma_net\.1\.weight' is missing"),
        (tensors | {"bg_net.0.weight": torch.zeros(2)}, r"surplus tensors bg_net\.0\.weight"),
        (tensors | {"color_net.0.weight": torch.zeros(16, 30)}, r"'color_net\.0\.weight' is .*\[16, 30\].*\[16, 31\]"),
        (tensors | {"color_net.0.weight": torch.zeros(16, 31, dtype=torch.long)}, r"'color_net\.0\.weight' is .*int64"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            Ngp().load(config, given, SCENE)


def test_param_groups_hold_every_parameter_once() -> None:
    field = small()
    groups = Ngp().param_groups(field)
    listed = [id(p) for g in groups for p in g["params"]]
    assert sorted(listed) == sorted(id(p) for p in field.parameters())
    assert {g["name"] for g in groups} == {"table", "nets"}
    torch.optim.Adam(groups)


def test_it_learns_a_sphere() -> None:
    """A hundred steps on the log-density of a soft sphere bring the error on held-out points down tenfold."""
    field = Ngp().build({"levels": 8, "log2_table": 12, "per_level_scale": 1.3, "hidden": 32}, SCENE, 0)
    center = torch.tensor(SCENE.box.center)

    def log_density(x: Tensor) -> Tensor:
        return 4.0 - 6.0 * torch.sigmoid(12.0 * ((x - center).norm(dim=-1) - 0.7))

    def error(x: Tensor) -> Tensor:
        return (field.density(field.encode(x)).log() - log_density(x)).square().mean()

    g = torch.Generator().manual_seed(0)
    low, size = torch.tensor(SCENE.box.min), torch.tensor(SCENE.box.size)
    held_out = low + torch.rand(4000, 3, generator=g) * size
    optimizer = torch.optim.Adam(Ngp().param_groups(field))
    with torch.no_grad():
        before = float(error(held_out))
    for _ in range(100):
        optimizer.zero_grad()
        error(low + torch.rand(2048, 3, generator=g) * size).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        after = float(error(held_out))
    assert after < before / 10


def test_clipped_densities_keep_a_gradient() -> None:
    """exp(clip(x)) forward; beyond the cuts the gradient is that of the cut, so that a density can come back."""
    x = torch.tensor([-5.0, -1.0, 0.5, 9.0], requires_grad=True)
    y = clipped_exp(x, -2.0, 3.0)
    expected = np.exp(np.array([-2.0, -1.0, 0.5, 3.0]))
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-6)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-6)


def test_constants_are_the_last_inputs_of_the_color_net() -> None:
    """Columns of the constants act as a bias: the same as moving them, weighted, past the first layer."""
    field = small(color_constants=[1.0, -0.5], color_layers=0)
    weight = field.color_net.layers[0].weight.detach()  # type: ignore[operator]
    x, d = torch.rand(5, 3) - 0.5, torch.nn.functional.normalize(torch.randn(5, 2, 3), dim=-1)
    latent = field.encode(x)
    inputs = torch.cat([sh_basis(d, 4), latent[:, None, 1:-1].expand(5, 2, -1)], -1)
    assert weight.shape[1] == inputs.shape[-1] + 2
    raw = inputs @ weight[:, :-2].T + weight[:, -2] - 0.5 * weight[:, -1]
    torch.testing.assert_close(field.color(latent, d), torch.sigmoid(raw))


def test_half_precision_on_disk_is_a_choice() -> None:
    field = small(dtype="float16")
    config, tensors = Ngp().save(field)
    assert {t.dtype for k, t in tensors.items()} == {torch.float16}
    again = Ngp().save(Ngp().load(config, tensors, SCENE))[1]
    assert all(torch.equal(tensors[k], again[k]) for k in tensors)
    assert {t.dtype for t in Ngp().save(small())[1].values()} == {torch.float32}
