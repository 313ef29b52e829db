"""The `nerf` architecture: real weights against TensorFlow's own answers, and every option against numpy in float64."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert.errors import InputError, RequestError
from pvdconvert.loading import read_parts, to_torch
from pvdconvert.plugin import Budget, Limits, TeacherFacts
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert_plugins.nerf import INFERENCE_ROWS, Nerf
from pvdconvert_plugins.nerf_spec import SHAPE_KEYS, NerfOptions

SCENE = Scene(Box.cube(1.5))
TINY: dict[str, Any] = {"depth": 3, "width": 24, "skips": [1], "bottleneck_width": 20, "direction_layers": [16]}
FACTS = TeacherFacts(SCENE, Box((-1.0, -0.5, -0.25), (1.0, 0.5, 0.75)), 1000, 500, 0.1)
Array = NDArray[np.float64]


# --- the paper's formulas once more, in numpy, one point at a time -------------------------------------------------


def encode_by_hand(v: Array, frequencies: list[float], include_input: bool, order: str) -> list[float]:
    if order == "per-coordinate":
        out = []
        for c in v:
            out += [c] if include_input else []
            for f in frequencies:
                out += [math.sin(f * c), math.cos(f * c)]
        return out
    head = list(v) if include_input else []
    if order == "channel-major":
        return [*head, *(wave(f * c) for wave in (math.sin, math.cos) for c in v for f in frequencies)]
    return [*head, *(wave(f * c) for f in frequencies for wave in (math.sin, math.cos) for c in v)]


def sh4_by_hand(d: Array) -> list[float]:
    """The first two bands only: enough to know the order and the signs (layouts section 0.3)."""
    a, b = 0.5 / math.sqrt(math.pi), math.sqrt(3 / (4 * math.pi))
    x, y, z = d
    return [a, -b * y, b * z, -b * x]


def answer_by_hand(o: NerfOptions, w: Mapping[str, Array], x: Array, d: Array) -> tuple[float, Array]:
    """Density and colour of one point for one direction. Box and mask are not part of it."""

    def layer(name: str, h: Array) -> Array:
        return w[f"fine.{name}.weight"] @ h + w[f"fine.{name}.bias"]

    def relu(h: Array) -> Array:
        return np.maximum(h, 0.0)

    if o.input == "box":
        low, high = (np.array((o.box or SCENE.box.to_json())[k]) for k in ("min", "max"))
        x = 2 * (x - (low + high) / 2) / max(high - low)
    frequencies = [o.frequency_scale * 2 ** (o.position_step * k) for k in range(o.position_frequencies)]
    encoded = np.array(encode_by_hand(x, frequencies, o.include_input, o.encoding_order))
    h = encoded
    for i in range(o.depth):
        h = layer(f"trunk.{i}", np.concatenate([encoded, h]) if i - 1 in o.skips else h)
        h = relu(h) if i > 0 or o.first_activation else h
    raw = float(layer("density", h)[0]) + o.density_bias
    raw = min(max(raw, o.density_clip[0]), o.density_clip[1]) if o.density_clip else raw
    activation = {"relu": max(raw, 0.0), "softplus": math.log1p(math.exp(raw)), "exp": math.exp(raw)}
    if o.bottleneck_width is not None:
        h = layer("bottleneck", h)
        h = relu(h) if o.bottleneck_activation == "relu" else h
    v = d * o.direction_length
    if o.direction_encoding == "sh":
        view = sh4_by_hand(v)
    elif o.direction_encoding == "frequency":
        frequencies = [o.frequency_scale * 2 ** (o.direction_step * k) for k in range(o.direction_frequencies)]
        view = encode_by_hand(v, frequencies, o.include_input, o.encoding_order)
    else:
        view = []
    h = np.concatenate([h, np.array(view)])
    for j in range(len(o.direction_layers)):
        h = relu(layer(f"direction.{j}", h))
    return o.density_scale * activation[o.density_activation], 1 / (1 + np.exp(-layer("rgb", h)))


VARIATIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "krrish94": {"skips": [], "first_activation": False, "bottleneck_activation": "relu", "position_frequencies": 6},
    "jiayi": {"encoding_order": "per-coordinate", "direction_length": 1.1},
    "channel-major": {"encoding_order": "channel-major", "include_input": False},
    "student": {
        "bottleneck_width": None,
        "direction_encoding": "sh",
        "direction_bands": 2,
        "density_activation": "exp",
        "density_bias": 1.5,
        "input": "box",
        "box": {"min": [-1, -1.2, -0.5], "max": [1, 1, 1]},
    },
    "softplus": {"density_activation": "softplus", "density_scale": 25.0, "density_bias": -1.0, "input": "box"},
    "two direction layers": {"direction_layers": [16, 12]},
    "no direction layer": {"direction_layers": []},
    "no view dependence": {"direction_encoding": "none", "direction_layers": [], "bottleneck_width": None},
    "nerfstudio": {
        "encoding_order": "channel-major",
        "frequency_scale": 2 * math.pi,
        "position_step": 8 / 9,
        "direction_step": 4 / 3,
        "position_frequencies": 4,
        "density_activation": "softplus",
    },
    "clipped": {"density_activation": "exp", "density_clip": [-0.1, 0.1]},
    "one layer": {"depth": 1, "skips": [], "first_activation": False},
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_answers_against_numpy(variation: str) -> None:
    config = {**TINY, **VARIATIONS[variation]}
    field = Nerf().build(config, SCENE, seed=3)
    with torch.no_grad():
        for p in field.parameters():
            if p.dim() == 1:
                p.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    weights = {name: p.detach().double().numpy() for name, p in field.named_parameters()}
    g = torch.Generator().manual_seed(5)
    x = torch.rand(9, 3, generator=g) - 0.4  # inside of every box above
    d = torch.nn.functional.normalize(torch.randn(9, 2, 3, generator=g), dim=-1)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            latent = field.encode(x)
            sigma, rgb = field.density(latent).detach(), field.color(latent, d).detach()
        for i in range(len(x)):
            for k in range(2):
                s, c = answer_by_hand(field.options, weights, x[i].double().numpy(), d[i, k].double().numpy())
                assert float(sigma[i]) == pytest.approx(s, rel=2e-5, abs=2e-5)
                np.testing.assert_allclose(rgb[i, k].numpy(), c, atol=3e-6)


def test_chunks_change_nothing() -> None:
    """More rows than a chunk, and a number that nothing divides, against one recorded pass."""
    field = Nerf().build(TINY, SCENE, seed=0)
    n = 2 * INFERENCE_ROWS + 37
    x = torch.rand(n, 3) * 3.6 - 1.8
    d = torch.nn.functional.normalize(torch.randn(n, 3, 3), dim=-1)
    latent = field.encode(x)
    with torch.no_grad():
        chunked = field.encode(x)
        torch.testing.assert_close(chunked, latent.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(field.color(chunked, d), field.color(latent, d).detach(), rtol=1e-4, atol=1e-5)
    outside = (x.abs() > 1.5).any(-1)
    assert 0 < int(outside.sum()) < n
    assert bool((field.density(chunked)[outside] == 0).all())


# --- the official lego weights -------------------------------------------------------------------------------------


@pytest.mark.requires_data
@pytest.mark.parametrize("net", ["fine", "coarse"])
def test_parity_with_tensorflow(data_root: Path, net: str) -> None:
    """Sigma to 1e-3 (values up to 213), rgb to 1e-5; alone, and in a batch large enough for the fast road."""
    folder = data_root / "checkpoints" / "bmild-lego"
    found, parts = read_parts(folder)
    assert (found.format, parts.architecture) == ("bmild", "nerf")
    options = NerfOptions.from_config(parts.config)
    assert options.networks == ("fine", "coarse")
    tensors = {k: v for k, v in to_torch(parts.tensors, str(folder)).items() if k.startswith(net)}
    alone = {k.replace(net, "fine", 1): v for k, v in tensors.items()}
    config = dataclasses.replace(options.network(net), has_coarse=False, coarse=None).to_config()
    # Some of the reference's points lie outside of the scene's box, where the network answers all the same.
    field = Nerf().load(config, alone, dataclasses.replace(parts.scene, box=Box.cube(10)))
    reference = json.loads((folder / "tf_reference_samples.json").read_text())
    z = torch.tensor(reference["z_vals"])
    top = 0.0
    for example in reference["examples"]:
        points = torch.tensor(example["ray_o"]) + torch.tensor(example["ray_d"]) * z[:, None]
        for times in (1, 40):
            x = points.repeat(times, 1)
            with torch.no_grad():
                sigma, rgb = field(x, torch.tensor(example["viewdir_unit"]).expand(len(x), 3))
            expected = torch.tensor(example[f"{net}_sigma"])
            top = max(top, float(expected.max()))
            torch.testing.assert_close(sigma, expected.repeat(times), rtol=0, atol=1e-3)
            torch.testing.assert_close(rgb, torch.tensor(example[f"{net}_rgb"]).repeat(times, 1), rtol=0, atol=1e-5)
    assert top > 100


# --- weights in and out --------------------------------------------------------------------------------------------


def test_coarse_network_is_kept() -> None:
    config = {**TINY, "has_coarse": True, "coarse": {"depth": 2, "width": 16, "skips": []}}
    field = Nerf().build(config, SCENE, seed=1)
    saved, tensors = Nerf().save(field)
    assert tensors["coarse.trunk.1.weight"].shape == (16, 16)
    assert tensors["fine.trunk.2.weight"].shape == (24, 24 + 63)
    again, same = Nerf().save(Nerf().load(json.loads(json.dumps(saved)), tensors, SCENE))
    assert again == saved
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[k], tensors[k]) for k in same)


def test_doubles_become_floats() -> None:
    _, tensors = Nerf().save(Nerf().build(TINY, SCENE, seed=0))
    field = Nerf().load(TINY, {k: v.double() for k, v in tensors.items()}, SCENE)
    assert {p.dtype for p in field.parameters()} == {torch.float32}


def test_mask_is_saved_and_obeyed() -> None:
    field = Nerf().build({**TINY, "density_activation": "exp"}, SCENE, seed=0)
    grid = torch.zeros(3, 3, 3, dtype=torch.uint8)
    grid[1, 1, 2] = 1
    field.restrict(Occupancy(torch.tensor([-1.5, -1.5, -1.5]), 1.0, grid))
    x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.4], [0.49, -0.49, 1.49], [0.0, 0.0, 1.51]])
    config, tensors = Nerf().save(field)
    assert config["mask"]["shape"] == [3, 3, 3]
    for one in (field, Nerf().load(config, tensors, SCENE)):
        assert (one.density(one.encode(x)) > 0).tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("fine.trunk.1.bias", "missing"),
        ("fine.trunk.9.bias", "surplus"),
        ("fine.rgb.weight", "misshapen"),
        ("mask.bits", "surplus"),
    ],
)
def test_wrong_tensors_are_named(key: str, change: str) -> None:
    _, tensors = Nerf().save(Nerf().build(TINY, SCENE, seed=0))
    if change == "missing":
        del tensors[key]
    else:
        tensors[key] = torch.zeros(5, 5)
    with pytest.raises(InputError, match=key):
        Nerf().load(TINY, tensors, SCENE)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"deep": 3}, "deep"),
        ({"depth": 0}, "depth"),
        ({"depth": True}, "depth"),
        ({"width": "wide"}, "width"),
        ({"skips": [7]}, "skips"),
        ({"skips": "4"}, "skips"),
        ({"include_input": 1}, "include_input"),
        ({"density_activation": "tanh"}, "density_activation"),
        ({"density_bias": float("nan")}, "density_bias"),
        ({"density_activation": "exp", "density_clip": [7, -2]}, "density_clip"),
        ({"density_activation": "exp", "density_clip": "high"}, "density_clip"),
        ({"density_clip": [-2, 7]}, "needs density_activation exp"),
        ({"position_step": 0}, "position_step"),
        ({"density_scale": 0.0}, "density_scale"),
        ({"coarse": {"input": "box"}}, "coarse"),
        ({"coarse": {"depth": 99}}, "depth"),
        ({"coarse": 3}, "coarse"),
        ({"box": {"min": [0, 0, 0]}}, "box"),
    ],
)
def test_wrong_configuration_is_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        NerfOptions.from_config(config)


def test_options_are_consistent() -> None:
    defaults = NerfOptions()
    assert NerfOptions.from_config(json.loads(json.dumps(defaults.to_config()))) == defaults
    assert set(SHAPE_KEYS) <= {f.name for f in dataclasses.fields(NerfOptions)}
    # The paper's network: 595,844 parameters (bmild's own file holds as many numbers).
    assert sum(math.prod(s) for s in defaults.shapes().values()) == 595844


# --- students ------------------------------------------------------------------------------------------------------


def weights_of(config: Mapping[str, Any]) -> int:
    return sum(math.prod(s) for s in NerfOptions.from_config(config).shapes().values())


def test_presets_grow() -> None:
    sizes = [weights_of(Nerf().plan(FACTS, Budget(p), Limits(), {})) for p in ("fast", "balanced", "best")]
    assert sizes == sorted(sizes)
    assert sizes[0] * 4 < sizes[2]


def test_plan_keeps_to_limits_overrides_and_size() -> None:
    plan = Nerf().plan
    config = plan(FACTS, Budget("best"), Limits({"width": 100, "input": "world"}), {"depth": 5})
    assert (config["width"], config["input"], config["depth"]) == (100, "world", 5)
    assert plan(FACTS, Budget("best"), Limits(), {"depth": 3})["skips"] == []
    small = plan(FACTS, Budget("best", max_mb=0.05), Limits(), {})
    assert 4 * weights_of(small) < 50_000
    with pytest.raises(RequestError, match="max-mb"):
        plan(FACTS, Budget("best", max_mb=0.05), Limits(), {"width": 256})
    with pytest.raises(RequestError, match="width"):
        plan(FACTS, Budget(), Limits({"width": 100}), {"width": 64})
    with pytest.raises(RequestError, match="witdh"):
        plan(FACTS, Budget(), Limits(), {"witdh": 64})


def test_student_sees_its_box() -> None:
    """A student encodes the box, not the world: moving and scaling the scene changes nothing but the density's unit."""
    config = Nerf().plan(FACTS, Budget("fast"), Limits(), {})
    field = Nerf().build(config, SCENE, 0)
    near = FACTS.occupied_box.to_json()
    far = Box.from_json({key: [100 + 10 * v for v in corner] for key, corner in near.items()})
    moved = Nerf().build({**config, "box": far.to_json()}, Scene(far), 0)
    x = torch.rand(20, 3) * torch.tensor(FACTS.occupied_box.size) + torch.tensor(FACTS.occupied_box.min)
    with torch.no_grad():
        a, b = field.encode(x), moved.encode(100 + 10 * x)
    assert bool((a[:, -1] == 1).all())
    torch.testing.assert_close(a, b, rtol=0, atol=2e-2)
