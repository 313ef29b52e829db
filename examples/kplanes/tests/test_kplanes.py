"""The distribution as installed: conformance, a conversion each way, and files in the program's own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert.errors import InputError, RequestError
from pvdconvert.loading import open_field
from pvdconvert.plugin import Budget, Limits, ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Box
from pvdconvert.testing import AnalyticScene, check_conversion, selftest

SIZES = ((9, 8, 7), (17, 15, 13))
LOW, HIGH = np.array([-1.5, -1.4, -1.2]), np.array([1.5, 1.6, 1.1])
Arrays = dict[str, NDArray[Any]]


def test_conformance() -> None:
    """Everything that pvdconvert asks of an architecture and of a format, a short conversion among it."""
    assert [check for check in selftest("kplanes") if not check.ok] == []


# ------------------------------------------------------------------- files: K-Planes' forward, written down in float64


def padded(n: int) -> int:
    return (n + 15) // 16 * 16


def checkpoint(decoder: str = "hybrid", *, channels: int = 8, concat: bool = True, images: int = 0) -> dict[str, Any]:
    """A ``model.pth`` with random values: planes [1, C, n[b], n[a]] and the vectors of tiny-cuda-nn's networks."""
    rng = np.random.default_rng(2)
    width = channels * (len(SIZES) if concat else 1)
    state: Arrays = {"field.aabb": np.array([LOW, HIGH])}
    for s, n in enumerate(SIZES):
        for p, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
            state[f"field.grids.{s}.{p}"] = rng.standard_normal((1, channels, n[b], n[a]))
    embedding = 5 if images else 0
    if images:
        state["field.appearance_embedding.weight"] = rng.standard_normal((images, embedding))
    state["field.direction_encoder.params"] = np.zeros(0)
    if decoder == "hybrid":
        sizes = {"sigma_net": [(64, padded(width)), (16, 64)],
                 "color_net": [(64, padded(31 + embedding)), (64, 64), (16, 64)]}  # fmt: skip
    else:
        sizes = {"sigma_net": [(16, padded(width))],
                 "color_basis": [(128, padded(3 + embedding)), (128, 128), (padded(3 * width), 128)]}  # fmt: skip
    for name, shapes in sizes.items():
        parts = [rng.standard_normal(shape).reshape(-1) * shape[1] ** -0.5 for shape in shapes]
        state[f"field.{name}.params"] = np.concatenate(parts)
    state["proposal_networks.0.grids.0"] = rng.standard_normal((1, 8, 4, 4))
    model = {k: torch.from_numpy(v.astype(np.float32)) for k, v in state.items()}
    return {"model": model, "optimizer": {}, "lr_scheduler": None, "global_step": 7}


def settings(decoder: str = "hybrid", **changes: Any) -> str:
    config = {"contract": False, "ndc": False, "density_activation": "trunc_exp", "linear_decoder": decoder == "linear",
              "concat_features_across_scales": True, **changes}  # fmt: skip
    return f"config = {config!r}\n"


def saved(folder: Path, value: dict[str, Any], config: str | None = None) -> Path:
    path = folder / "model.pth"
    torch.save(value, path)
    if config is not None:
        (folder / "config.py").write_text(config)
    return path


def bilinear(plane: NDArray[Any], u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """[N, C] of [C, H, W] at u along W and v along H in [-1, 1]: align_corners, the border beyond."""
    i, j = (np.clip((c + 1) / 2, 0, 1) * (n - 1) for c, n in ((u, plane.shape[2]), (v, plane.shape[1])))
    a, b = np.minimum(i.astype(int), plane.shape[2] - 2), np.minimum(j.astype(int), plane.shape[1] - 2)
    f, g = i - a, j - b
    top, bottom = (plane[:, b + s, a] * (1 - f) + plane[:, b + s, a + 1] * f for s in (0, 1))
    return np.asarray((top * (1 - g) + bottom * g).T)


def perceptron(params: NDArray[Any], x: NDArray[Any], widths: list[int], outputs: int) -> NDArray[Any]:
    """tiny-cuda-nn: inputs padded by ones to 16, matrices [out, in] one after the other, ReLU between them."""
    h = np.concatenate([x, np.ones((len(x), padded(x.shape[1]) - x.shape[1]))], axis=1)
    start = 0
    for k, units in enumerate(widths):
        size = units * h.shape[1]
        h = (np.maximum(h, 0) if k else h) @ params[start : start + size].reshape(units, -1).T
        start += size
    assert start == len(params)
    return h[:, :outputs]


def harmonics(d: NDArray[Any]) -> NDArray[Any]:
    """Sixteen real harmonics in tiny-cuda-nn's order and signs, by their polynomials."""
    x, y, z = d.T
    c1, c2, c3 = 0.48860251190291987, 1.0925484305920792, 0.59004358992664352
    c4 = 0.45704579946446572
    return np.stack(
        [np.full_like(x, 0.28209479177387814), -c1 * y, c1 * z, -c1 * x, c2 * x * y, -c2 * y * z,
         0.94617469575755997 * z * z - 0.31539156525251999, -c2 * x * z, 0.54627421529603959 * (x * x - y * y),
         c3 * y * (-3 * x * x + y * y), 2.8906114426405538 * x * y * z, c4 * y * (1 - 5 * z * z),
         0.3731763325901154 * z * (5 * z * z - 3), c4 * x * (1 - 5 * z * z), 1.4453057213202769 * z * (x * x - y * y),
         c3 * x * (-x * x + 3 * y * y)], axis=1)  # fmt: skip


def truth(
    value: dict[str, Any], x: NDArray[Any], d: NDArray[Any], *, concat: bool = True, activation: str = "trunc_exp"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(sigma, rgb) as the program computes them."""
    state: Arrays = {k: t.double().numpy() for k, t in value["model"].items()}
    p = (x - LOW) * 2 / (HIGH - LOW) - 1
    scales = []
    for s in range(len(SIZES)):
        product = np.ones(1)
        for i, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
            product = product * bilinear(state[f"field.grids.{s}.{i}"][0], p[:, a], p[:, b])
        scales.append(product)
    features = np.concatenate(scales, axis=1) if concat else np.sum(scales, axis=0)
    table = state.get("field.appearance_embedding.weight")
    look = np.zeros((len(x), 0)) if table is None else np.repeat(table.mean(0)[None], len(x), axis=0)
    if "field.color_net.params" in state:
        out = perceptron(state["field.sigma_net.params"], features, [64, 16], 16)
        raw = out[:, 15]
        logits = perceptron(
            state["field.color_net.params"], np.concatenate([harmonics(d), out[:, :15], look], axis=1), [64, 64, 16], 3
        )
    else:
        width = features.shape[1]
        raw = perceptron(state["field.sigma_net.params"], features, [16], 1)[:, 0]
        basis = perceptron(
            state["field.color_basis.params"], np.concatenate([d, look], axis=1), [128, 128, padded(3 * width)],
            3 * width,
        )  # fmt: skip
        logits = (basis.reshape(-1, 3, width) * features[:, None]).sum(-1)
    sigma = np.exp(raw - 1) if activation == "trunc_exp" else np.maximum(raw, 0)
    return sigma, 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize(
    ("decoder", "channels", "concat", "activation", "images"),
    [
        ("hybrid", 8, True, "trunc_exp", 0),
        ("hybrid", 12, True, "relu", 0),  # 24 features: eight columns of ones
        ("hybrid", 16, False, "trunc_exp", 3),
        ("linear", 8, True, "trunc_exp", 0),
        ("linear", 5, False, "relu", 4),
    ],
)
def test_files_answer_as_the_program_does(
    tmp_path: Path, decoder: str, channels: int, concat: bool, activation: str, images: int
) -> None:
    value = checkpoint(decoder, channels=channels, concat=concat, images=images)
    config = settings(decoder, concat_features_across_scales=concat, density_activation=activation)
    loaded = open_field(saved(tmp_path, value, config))
    assert (loaded.format, loaded.architecture) == ("kplanes", "kplanes")
    rng = np.random.default_rng(4)
    x = LOW + (rng.random((2000, 3)) * 1.4 - 0.2) * (HIGH - LOW)  # beyond field.aabb too: the border counts there
    d = rng.standard_normal((2000, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    sigma, rgb = truth(value, x, d, concat=concat, activation=activation)
    mine, color = loaded.field(torch.from_numpy(x).float(), torch.from_numpy(d).float())
    np.testing.assert_allclose(mine.numpy(), sigma, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(color.numpy(), rgb, atol=1e-4)
    assert loaded.scene.assumed == ("box", "background")
    assert loaded.parts.provenance["step"] == 7


def test_what_is_not_in_the_file_is_told_or_assumed(tmp_path: Path) -> None:
    path = saved(tmp_path, checkpoint())
    assert open_field(path).scene.assumed == ("box", "background", "density_activation")
    np.testing.assert_allclose(open_field(path).scene.box.size, 2 * (HIGH - LOW), rtol=1e-6)
    other = tmp_path / "other.py"
    other.write_text("import os\nos.abort()\n" + settings(density_activation="relu"))
    box = Box.cube(1.0)
    loaded = open_field(path, read=ReadOptions(bounds=box, background=(0.0, 0.0, 0.0), config=other))
    assert (loaded.scene.box, loaded.scene.background, loaded.scene.assumed) == (box, (0.0, 0.0, 0.0), ())
    assert loaded.parts.config["density_activation"] == "relu"
    outside = torch.tensor([[1.01, 0.0, 0.0]])
    assert float(loaded.field.density(loaded.field.encode(outside))) == 0.0


def changed(key: str, tensor: torch.Tensor | None) -> dict[str, Any]:
    value = checkpoint()
    if tensor is None:
        del value["model"][key]
    else:
        value["model"][key] = tensor
    return value


@pytest.mark.parametrize(
    ("value", "config", "words"),
    [
        (changed("field.grids.0.3", torch.zeros(1, 8, 4, 9)), None, "dynamic"),
        (changed("spatial_distortion.global_scale", torch.ones(3)), None, "contracted"),
        (checkpoint(), settings(contract=True), "contracted"),
        (checkpoint(), settings(ndc=True), "forward-facing"),
        (changed("field.aabb", torch.tensor([[-3, -1.67, -1.2], [3, 1.67, 1.2]])), None, "forward-facing"),
        (changed("field.aabb", torch.zeros(3)), None, "'field.aabb'"),
        (changed("field.grids.1.2", None), None, "'field.grids.1.2'"),
        (changed("field.grids.1.2", torch.zeros(1, 8, 5, 5)), None, "'field.grids.1.2'"),
        (changed("field.color_net.params", torch.zeros(7)), None, "do not fit"),
        (changed("field.sigma_net.params", None), None, "expected field.sigma_net"),
        (changed("field.more", torch.zeros(7)), None, "'field.more' has no place"),
        (checkpoint(), settings(density_activation="softplus"), "'softplus'"),
        (checkpoint(), "config = open('x')\n", "not plain values"),
        (checkpoint(), "settings = {}\n", "holds no config"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, value: dict[str, Any], config: str | None, words: str) -> None:
    path = saved(tmp_path, value, config)
    with pytest.raises(InputError, match=words) as caught:
        open_field(path, from_="kplanes")
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# ------------------------------------------------------------------------------------------------- the architecture


def plan(budget: Budget | None = None, limits: Limits | None = None, **overrides: Any) -> dict[str, Any]:
    scene = AnalyticScene()
    facts = scene.facts(scene.occupancy())
    return default().architecture("kplanes").plan(facts, budget or Budget("fast"), limits or Limits(), overrides)


def test_plans() -> None:
    fast, best = plan(), plan(Budget("best"))
    assert max(fast["resolutions"][0]) == 64
    assert [max(r) for r in best["resolutions"]] == [128, 256, 512]
    assert plan(decoder="linear", scales=[1, 3])["scales"] == [1, 3]
    assert plan(limits=Limits({"channels": 4}))["channels"] == 4
    with pytest.raises(RequestError, match="channels=8 was asked"):
        plan(limits=Limits({"channels": 4}), channels=8)
    wrong: dict[str, Any] = {"decoder": "mlp", "channels": 0, "scales": [], "concat": 3, "density_shift": "x"}
    for key, value in wrong.items():
        with pytest.raises(RequestError, match=key if key != "density_shift" else "malformed"):
            plan(None, None, **{key: value})
    with pytest.raises(RequestError, match="MB at least, --max-mb"):
        plan(Budget("fast", max_mb=0.01))


@pytest.mark.parametrize("decoder", ["hybrid", "linear"])
def test_a_plane_multiplies_what_the_others_say(decoder: str) -> None:
    """Where one plane is 0 every feature is 0, whatever the other two hold: products, not sums."""
    code, scene = default().architecture("kplanes"), AnalyticScene().scene
    field = code.build(plan(decoder=decoder, concat=False), scene, 0)
    features: Any = field.get_submodule("")
    x = torch.rand(64, 3) - 0.5
    assert bool((features.plane_features(x) > 0).all())
    with torch.no_grad():
        for s in range(0, len(features.planes), 3):
            features.planes[s + 1].zero_()
    assert bool((features.plane_features(x) == 0).all())


@pytest.mark.parametrize("concat", [True, False])
def test_the_linear_decoder_is_saved_and_loaded(concat: bool) -> None:
    """The conformance suite asks this of the default decoder; colours depend on the direction here too."""
    code, scene = default().architecture("kplanes"), AnalyticScene().scene
    field = code.build(plan(decoder="linear", concat=concat, channels=4), scene, 3)
    back = code.load(*code.save(field), scene)
    x, d = torch.rand(99, 3) - 0.5, torch.nn.functional.normalize(torch.randn(99, 2, 3), dim=-1)
    with torch.no_grad():
        for one, other in zip(field.state_dict().values(), back.state_dict().values(), strict=True):
            assert torch.equal(one, other)
        rgb = field.color(field.encode(x), d)
        assert torch.equal(rgb, back.color(back.encode(x), d))
    assert float((rgb[:, 0] - rgb[:, 1]).abs().max()) > 0


def test_a_conversion_from_it() -> None:
    """An untrained student as a teacher would be empty: one that was fitted to a ball of density a few steps."""
    code, scene = default().architecture("kplanes"), AnalyticScene()
    field = code.build(plan(Budget("fast", max_mb=1.0)), scene.scene, 0)
    optimizer = torch.optim.Adam(code.param_groups(field))
    x = torch.rand(4096, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    d = torch.tensor([[[0.0, 0.0, -1.0]]]).expand(len(x), 1, 3)
    with torch.no_grad():
        sigma, rgb = scene(x, d[:, 0])
    for _ in range(120):
        optimizer.zero_grad()
        latent = field.encode(x)
        alpha = torch.exp(-0.05 * field.density(latent)) - torch.exp(-0.05 * sigma)
        off = (field.color(latent, d)[:, 0] - rgb).square().mean(1)
        (alpha.square().mean() + ((sigma > 0) * off).mean()).backward()
        optimizer.step()
    result = check_conversion("plenoxels", field.eval().requires_grad_(False))
    assert result.ok, result.detail
