"""jaxnerf: flax files made by hand in its key tree; answers in float64 from the formulas of layouts section 5.4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
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
from pvdconvert_formats.jaxnerf import probe

Array = NDArray[Any]
Net = list[tuple[Array, Array]]


def read(path: Path, options: ReadOptions | None = None) -> Parts:
    found = identify(path)
    assert found.format == "jaxnerf"
    return default().format(found.format).read(found.manifest, options or ReadOptions())


def network(seed: int, depth: int = 8, width: int = 24, octaves: tuple[int, int] = (10, 4), views: int = 1) -> Net:
    """(kernel [in, out], bias) of Dense_0, Dense_1, ...: after layers 4, 8, ... the input is [hidden, encoded]."""
    rng = np.random.default_rng(seed)
    wide, view_wide = (3 + 6 * k for k in octaves)
    sizes = [(wide if i == 0 else width + wide * (i % 4 == 1 and i > 1), width) for i in range(depth)]
    sizes.append((width, 1))
    if views:
        sizes += [(width, width), (width + view_wide, width // 2), *[(width // 2, width // 2)] * (views - 1)]
    sizes.append((width // 2 if views else width, 3))
    net = [
        (
            rng.normal(size=s, scale=(2 / s[0]) ** 0.5).astype(np.float32),
            rng.normal(size=s[1], scale=0.1).astype(np.float32),
        )
        for s in sizes
    ]
    net[depth][1][:] = 0.5  # so that some density is left
    return net


def posenc(v: Array, octaves: int, legacy: bool) -> Array:
    """[v, sin of (2^0 v, 2^1 v, ...), cos of the same]; legacy: [v, sin 2^0 v, cos 2^0 v, sin 2^1 v, ...]."""
    if legacy:
        return np.concatenate([v, *[f(2.0**k * v) for k in range(octaves) for f in (np.sin, np.cos)]], 1)
    scaled = np.concatenate([2.0**k * v for k in range(octaves)], 1) if octaves else v[:, :0]
    return np.concatenate([v, np.sin(scaled), np.cos(scaled)], 1)


def truth(net: Net, x: Array, d: Array, octaves: tuple[int, int], legacy: bool) -> tuple[Array, Array]:
    layers = [(w.astype(np.float64), b.astype(np.float64)) for w, b in net]
    depth = next(i for i, (w, _) in enumerate(layers) if w.shape[1] == 1)

    def dense(k: int, h: Array) -> Array:
        out: Array = h @ layers[k][0] + layers[k][1]
        return out

    e = posenc(x.astype(np.float64), octaves[0], legacy)
    h = e
    for i in range(depth):
        h = np.maximum(dense(i, h), 0)
        if i % 4 == 0 and i > 0:
            h = np.concatenate([h, e], 1)
    sigma = np.maximum(dense(depth, h), 0)[:, 0]
    if len(layers) > depth + 2:
        h = np.concatenate([dense(depth + 1, h), posenc(d.astype(np.float64), octaves[1], legacy)], 1)
        for k in range(depth + 2, len(layers) - 1):
            h = np.maximum(dense(k, h), 0)
    return sigma, 1 / (1 + np.exp(-dense(len(layers) - 1, h)))


def ext(array: Array) -> msgpack.ExtType:
    """flax's array: ExtType 1 around (shape, name of the dtype, bytes)."""
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def tree(net: Net) -> dict[str, Any]:
    return {f"Dense_{k}": {"kernel": ext(w), "bias": ext(b)} for k, (w, b) in enumerate(net)}


def save(path: Path, coarse: Net | None, fine: Net | None, *, bare: bool = False, **more: Any) -> Path:
    nets = {name: tree(net) for name, net in (("MLP_0", coarse), ("MLP_1", fine)) if net is not None} | more
    moments = {n: {k: {"kernel": {"grad_ema": 0.5}} for k in net} for n, net in nets.items()}
    state = {"step": 1000000, "param_states": {"params": moments}}
    value = {"params": nets} if bare else {"optimizer": {"state": state, "target": {"params": nets}}}
    path.write_bytes(msgpack.packb(value))
    return path


def points(n: int = 64) -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    d = rng.normal(size=(n, 3))
    return (rng.random((n, 3)) * 1.6 - 0.8).astype(np.float32), (d / np.linalg.norm(d, axis=1)[:, None]).astype("f4")


CASES = {
    "as published": (8, 24, (10, 4), 1),
    "ten layers": (10, 16, (4, 2), 1),
    "shallow, two condition layers": (3, 16, (6, 1), 2),
    "no octaves": (2, 16, (0, 0), 1),
    "no view directions": (8, 16, (5, 4), 0),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_function_of_its_program(tmp_path: Path, case: str, legacy: bool) -> None:
    depth, width, octaves, views = CASES[case]
    coarse, fine = (network(seed, depth, width, octaves, views) for seed in (1, 2))
    path = save(tmp_path / "checkpoint_1000000", coarse, fine)
    parts = read(path, ReadOptions(extra={"posenc": "legacy"}) if legacy else None)
    tensors = {k: torch.from_numpy(t.numpy().copy()) for k, t in parts.tensors.items()}
    field = default().architecture("nerf").load(dict(parts.config), tensors, parts.scene)
    x, d = points()
    with torch.no_grad():
        sigma, rgb = field(torch.from_numpy(x), torch.from_numpy(d))
    expected = truth(fine, x, d, octaves, legacy)
    assert (expected[0] > 0).any()
    np.testing.assert_allclose(sigma.numpy(), expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rgb.numpy(), expected[1], rtol=1e-4, atol=1e-5)
    assert parts.config["has_coarse"]
    assert parts.provenance["step"] == 1000000
    assert any("posenc=legacy" in n for n in parts.notes) == (not legacy)


def test_bare_parameters_of_one_network(tmp_path: Path) -> None:
    parts = read(save(tmp_path / "params", network(0), None, bare=True))
    assert not parts.config["has_coarse"]
    assert any("only MLP_0" in n for n in parts.notes)
    assert parts.scene.assumed == ("box", "background", "near", "far")


def test_its_yaml_says_the_rest(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoint_1", network(0), network(1))
    config = tmp_path / "blender.yaml"
    config.write_text("dataset: blender\nnear: 2.5\nfar: 6.\nwhite_bkgd: false\nlegacy_posenc_order: true\n")
    parts = read(path, ReadOptions(config=config))
    assert (parts.scene.near, parts.scene.background, parts.scene.assumed) == (2.5, (0.0, 0.0, 0.0), ("box",))
    legacy = read(path, ReadOptions(extra={"posenc": "legacy"}))
    first = "fine.trunk.0.weight"
    np.testing.assert_array_equal(parts.tensors[first].numpy(), legacy.tensors[first].numpy())
    config.write_text("dataset: llff\nnear: 0.\nfar: 1.\nwhite_bkgd: false\nsigma_activation: softplus\n")
    parts = read(path, ReadOptions(config=config, extra={"width": "504", "height": "378", "focal": "400"}))
    assert (parts.scene.ray_space.kind, parts.scene.ray_space.focal, parts.scene.far) == ("ndc", 400.0, 1.0)
    assert parts.config["density_activation"] == "softplus"
    config.write_text("dataset: llff\nspherify: true\n")
    with pytest.raises(InputError, match="--bounds"):
        read(path, ReadOptions(config=config))
    assert read(path, ReadOptions(config=config, bounds=Box.cube(1.0), near=0.5)).scene.near == 0.5
    for text, match in [
        ("net_activation: swish", "net_activation 'swish'"),
        ("sigma_activation: exp", "sigma_activation 'exp'"),
        ("min_deg_point: 2", "min_deg_point 2"),
        ("- 1", "not a table"),
        ("{", "YAML"),
        ("!!python/object/apply:os.getcwd []", "not a table"),
        ("[" * 5000, "YAML"),
    ]:
        config.write_text(text)
        with pytest.raises(InputError, match=match):
            read(path, ReadOptions(config=config))


def changed(net: Net, index: int, kernel: tuple[int, int]) -> Net:
    other = list(net)
    other[index] = (np.zeros(kernel, np.float32), np.zeros(kernel[1], np.float32))
    return other


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (changed(network(0), 0, (96, 24)), "mip-NeRF"),
        (changed(network(0), 8, (24, 2)), "no layer of one output"),
        (changed(network(0), 3, (25, 24)), r"'3\.weight'"),
        (changed(network(0), 11, (12, 27)), r"'11\.weight'.*\[3, 12\]"),
        (network(0)[:9], "no NeRF of this program"),
        (changed(network(0), 10, (60, 12)), "36 columns|only one of the two"),
    ],
)
def test_wrong_shapes(tmp_path: Path, net: Net, match: str) -> None:
    path = save(tmp_path / "checkpoint_1", net, None)
    with pytest.raises(InputError, match=match) as caught:
        default().format("jaxnerf").read(open_manifest(path), ReadOptions())
    assert "checkpoint_1: jaxnerf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_of_this_program(tmp_path: Path) -> None:
    match = probe(open_manifest(save(tmp_path / "mip", changed(network(0), 0, (96, 24)), None)))
    assert match is not None
    assert match.score < 0.3
    path = save(
        tmp_path / "checkpoint_1", network(0), None, GLOEmbed_0={"Embed_0": {"embedding": ext(np.zeros((2, 2)))}}
    )
    with pytest.raises(InputError, match="'GLOEmbed_0' beside MLP_0"):
        read(path)
    path = save(tmp_path / "checkpoint_2", network(0), network(1))
    with pytest.raises(InputError, match="posenc="):
        read(path, ReadOptions(extra={"posenc": "random"}))
    path = save(tmp_path / "checkpoint_3", None, network(1))
    with pytest.raises(InputError, match=r"MLP_0\.Dense_0\.kernel"):
        default().format("jaxnerf").read(open_manifest(path), ReadOptions())
