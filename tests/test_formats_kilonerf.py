"""KiloNeRF: files made by hand in its key tree; answers in float64, a point at a time, by layouts section 5.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.identify import identify
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Box
from pvdconvert_formats.kilonerf import probe

Array = NDArray[Any]
State = dict[str, Array]
LOW, HIGH = (-0.9, -1.6, -1.0), (0.9, 1.6, 1.1)
RESOLUTION = (3, 5, 2)
BOUNDS = Box(LOW, HIGH)
GIVEN = ReadOptions(BOUNDS, extra={"resolution": "3,5,2"})


def read(path: Path, options: ReadOptions = GIVEN) -> Parts:
    found = identify(path)
    assert found.format == "kilonerf"
    return default().format(found.format).read(found.manifest, options)


def networks(
    *,
    layers: int = 2,
    refeed: int | None = None,
    octaves: tuple[int, int] = (10, 4),
    independent: bool = False,
    shared: bool = False,
    width: int = 12,
    half: int = 8,
) -> State:
    """Weights [N, out, in] and biases [N, out]; shared layers without the N."""
    rng = np.random.default_rng(layers)
    count = int(np.prod(RESOLUTION))
    wide, views = (3 + 6 * k for k in octaves)
    sizes = {f"pts_linears.{i}": (width + wide * (refeed == i - 1) if i else wide, width) for i in range(layers)}
    sizes["feature_linear"] = (width, width + 4 * independent)
    if not independent:
        sizes["alpha_linear"] = (width, 1)
    sizes |= {"direction_layer": (width + views, half), "rgb_linear": (half, 3)}
    out: State = {}
    for name, (inside, units) in sizes.items():
        lead = () if shared and name in ("direction_layer", "rgb_linear") else (count,)
        out[f"{name}.weight"] = rng.normal(size=(*lead, units, inside), scale=(2 / inside) ** 0.5).astype(np.float32)
        out[f"{name}.bias"] = rng.normal(size=(*lead, units), scale=0.3).astype(np.float32)
    return out


def fourier(v: Array, octaves: int) -> Array:
    """Of each coordinate [c, cos c, cos 2c, ..., sin c, sin 2c, ...]."""
    return np.array([e for c in v for e in (c, *(f(2.0**k * c) for f in (np.cos, np.sin) for k in range(octaves)))])


def truth(state: State, x: Array, d: Array, octaves: tuple[int, int], refeed: int | None) -> tuple[float, Array]:
    """One point inside of the domain, by the network of its cell."""
    low, high = np.array(LOW), np.array(HIGH)
    side = (high - low) / RESOLUTION
    i = np.floor((x - low) / side).astype(int)
    n = (i[0] * RESOLUTION[1] + i[1]) * RESOLUTION[2] + i[2]

    def layer(name: str, h: Array) -> Array:
        w, b = state[f"{name}.weight"].astype(np.float64), state[f"{name}.bias"].astype(np.float64)
        out: Array = (w @ h + b) if w.ndim == 2 else w[n] @ h + b[n]
        return out

    e = fourier(2 * (x - (low + side * i)) / side - 1, octaves[0])
    h = e
    for k in range(sum(key.startswith("pts_linears") for key in state) // 2):
        h = np.maximum(layer(f"pts_linears.{k}", h), 0)
        h = np.concatenate([e, h]) if k == refeed else h
    feature, plain = layer("feature_linear", h), np.zeros(3)
    if "alpha_linear.weight" in state:
        alpha = layer("alpha_linear", h)[0]
    else:
        plain, alpha, feature = feature[:3], feature[3], feature[4:]
    y = np.maximum(layer("direction_layer", np.concatenate([feature, fourier(d, octaves[1])])), 0)
    return max(float(alpha), 0.0), 1 / (1 + np.exp(-(layer("rgb_linear", y) + plain)))


def save(path: Path, state: State, *, turned: bool = False, **more: Any) -> Path:
    """``turned``: the layout of the program's grouped products, [N, in, out]."""
    tensors = {
        k: torch.from_numpy(np.swapaxes(a, 1, 2).copy() if turned and a.ndim == 3 else a.copy())
        for k, a in state.items()
    }
    value = {"global_step": 1000000, "model_state_dict": tensors, "numpy_rng_state": ("MT19937", np.arange(4), 0)}
    torch.save({**value, **more}, path)
    return path


def build(parts: Parts) -> Any:
    tensors = {k: torch.from_numpy(t.numpy().copy()) for k, t in parts.tensors.items()}
    return default().architecture(parts.architecture).load(dict(parts.config), tensors, parts.scene)


def points(n: int = 200) -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    d = rng.normal(size=(n, 3))
    x = np.array(LOW) + 0.01 + rng.random((n, 3)) * (np.array(HIGH) - np.array(LOW) - 0.02)
    return x.astype(np.float32), (d / np.linalg.norm(d, axis=1)[:, None]).astype(np.float32)


CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "fed again": {"layers": 4, "refeed": 1, "octaves": (4, 2)},
    "colour without direction": {"independent": True, "octaves": (3, 1)},
    "shared colour layers": {"shared": True, "octaves": (3, 1)},
    "no octaves": {"octaves": (0, 0)},
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_function_of_its_program(tmp_path: Path, case: str, turned: bool) -> None:
    state = networks(**CASES[case])
    parts = read(save(tmp_path / "checkpoint_1000000.pth", state, turned=turned))
    field = build(parts)
    x, d = points()
    with torch.no_grad():
        sigma, rgb = field(torch.from_numpy(x), torch.from_numpy(d))
    octaves, refeed = CASES[case].get("octaves", (10, 4)), CASES[case].get("refeed")
    expected = [truth(state, a.astype(np.float64), b.astype(np.float64), octaves, refeed) for a, b in zip(x, d)]
    assert 0.1 < np.mean([s > 0 for s, _ in expected]) <= 1
    np.testing.assert_allclose(sigma.numpy(), [s for s, _ in expected], rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(rgb.numpy(), [c for _, c in expected], rtol=1e-3, atol=2e-4)
    assert parts.architecture == "kilonerf"
    assert parts.provenance["step"] == 1000000
    saved = default().architecture("kilonerf").save(field)[1]
    for key, tensor in parts.tensors.items():
        np.testing.assert_array_equal(saved[key].numpy(), tensor.numpy())


def test_nothing_is_drawn_outside_of_the_domain(tmp_path: Path) -> None:
    field = build(read(save(tmp_path / "a.pth", networks())))
    x = torch.tensor([[0.89, 0.0, 0.0], [0.8995, 0.0, 0.0], [0.0, -1.5995, 0.0], [0.0, 0.0, 1.2], [2.0, 2.0, 2.0]])
    state = networks()
    state["alpha_linear.bias"][:] = 50.0
    field = build(read(save(tmp_path / "a.pth", state)))
    with torch.no_grad():
        assert (field.density(field.encode(x)) > 0).tolist() == [True, False, False, False, False]


def test_the_occupancy_grid_is_part_of_the_field(tmp_path: Path) -> None:
    state = networks(octaves=(2, 1))
    state["alpha_linear.bias"][:] = 50.0
    path = save(tmp_path / "checkpoint.pth", state)
    grid = torch.rand(6, 10, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    x, _ = points()
    low, high = np.array(LOW, np.float32), np.array(HIGH, np.float32)
    i = ((x - low) / ((high - low) / np.array([6, 10, 4], np.float32))).astype(int)
    expected = grid.numpy()[i[:, 0], i[:, 1], i[:, 2]]
    for stored in (grid, grid.reshape(-1)):  # a flat one: twice the lattice on every axis
        torch.save(stored, tmp_path / "occupancy.pth")
        parts = read(path)
        field = build(parts)
        with torch.no_grad():
            sigma = field.density(field.encode(torch.from_numpy(x)))
        np.testing.assert_array_equal((sigma > 0).numpy(), expected)
        again = default().architecture("kilonerf").save(field)
        np.testing.assert_array_equal(again[1]["occupancy.bits"].numpy(), parts.tensors["occupancy.bits"].numpy())
        assert again[0]["occupancy"] == [6, 10, 4]
    torch.save(torch.zeros(7, dtype=torch.bool), tmp_path / "occupancy.pth")
    with pytest.raises(InputError, match=r"7 cells.*--extra occupancy="):
        read(path)
    torch.save({"a": grid, "b": grid}, tmp_path / "occupancy.pth")
    with pytest.raises(InputError, match="2 tensors"):
        read(path)


def test_lattice_and_domain_are_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint.pth", networks())
    with pytest.raises(InputError, match=r"fixed_resolution of the 30 networks is in no file.*--extra resolution="):
        read(path, ReadOptions(BOUNDS))
    with pytest.raises(InputError, match=r"\[2, 5, 2\] does not make 30"):
        read(path, ReadOptions(BOUNDS, extra={"resolution": "2,5,2"}))
    with pytest.raises(InputError, match="--bounds"):
        read(path, ReadOptions(extra={"resolution": "3,5,2"}))
    config = tmp_path / "Lego.yaml"
    config.write_text("fixed_resolution: [3, 5, 2]\ndiscovery: {num_frequencies: 10}\n")
    (tmp_path / "bbox.txt").write_text("-0.9 -1.6 -1.0 0.9 1.6 1.1 0.4\n")
    parts = read(path, ReadOptions(config=config))
    assert parts.scene.box == BOUNDS
    assert parts.scene.assumed == ("background",)
    assert any("no occupancy.pth" in n for n in parts.notes)
    config.write_text("fixed_resolution: [3, 5, 2]\nglobal_domain_min: [-1, -1, -1]\nglobal_domain_max: [1, 1, 1]\n")
    assert read(path, ReadOptions(config=config)).scene.box == Box.cube(1.0)
    for text, match in [("use_global_coordinates: true", "use_global"), ("{", "YAML"), ("- 1", "not a table")]:
        config.write_text(text)
        with pytest.raises(InputError, match=match):
            read(path, ReadOptions(BOUNDS, config=config))


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("rgb_linear.weight", None, "rgb_linear.weight.*missing"),
        ("feature_linear.bias", np.zeros((30, 11), np.float32), r"feature_linear\.weight.*\[30, 11\]"),
        ("pts_linears.0.weight", np.zeros((30, 12, 50), np.float32), "no frequency encoding"),
        ("pts_linears.1.weight", np.zeros((30, 12, 13), np.float32), "13 inputs"),
        ("direction_layer.weight", np.zeros((30, 8, 30), np.float32), "18 inputs are no encoding"),
        ("layers.0.weight", np.zeros((30, 2, 2), np.float32), "layers.0.weight.*no place"),
    ],
)
def test_wrong_shapes(tmp_path: Path, key: str, value: Array | None, match: str) -> None:
    state = {k: v for k, v in {**networks(), key: value}.items() if v is not None}
    path = save(tmp_path / "a.pth", state)
    with pytest.raises(InputError, match=match) as caught:
        default().format("kilonerf").read(open_manifest(path), GIVEN)
    assert "a.pth: kilonerf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_single_network_that_it_starts_from(tmp_path: Path) -> None:
    from tests.test_formats_nerf_pytorch import Net
    from tests.test_formats_nerf_pytorch import points as torch_points

    torch.manual_seed(1)
    net = Net(4, 16, 1, (4, 2), 1)
    torch.save({"global_step": 5, "model_state_dict": net.state_dict()}, tmp_path / "a.pth")
    parts = read(tmp_path / "a.pth", ReadOptions(BOUNDS))
    x, d = torch_points()
    with torch.no_grad():
        sigma, rgb = build(parts)(x, d)
    expected = net(x, d)
    torch.testing.assert_close(sigma.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rgb.double(), expected[1], rtol=1e-4, atol=1e-5)
    assert parts.architecture == "nerf"


def test_no_other_file_is_claimed(data_root: Path) -> None:
    for path in sorted((data_root / "checkpoints").rglob("*")):
        if path.is_file() and path.suffix in (".tar", ".pt", ".pth", ".th", ".ckpt") and path.parent.name != "refuse":
            match = probe(open_manifest(path))
            assert match is None or match.score < 0.3
