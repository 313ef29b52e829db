"""kwea123/nerf_pl: known answers in float64 from the formulas of layouts sections 5.3 and 9.2, in its own key tree."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.identify import identify
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Box
from pvdconvert_formats.nerf_pl import probe

State = dict[str, Tensor]
FOCAL = {"focal": "407.5"}


def read(path: Path, options: ReadOptions | None = None) -> Parts:
    found = identify(path)
    assert found.format == "nerf-pl"
    return default().format(found.format).read(found.manifest, options or ReadOptions())


def ask(parts: Parts, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    tensors = {k: torch.from_numpy(t.numpy().copy()) for k, t in parts.tensors.items()}
    field = default().architecture("nerf").load(dict(parts.config), tensors, parts.scene)
    with torch.no_grad():
        sigma, rgb = field(x, d)
    return sigma.double(), rgb.double()


def network(seed: int = 0, width: int = 24, depth: int = 8, skip: int = 4) -> State:
    """Weights in the program's names: layer ``skip`` (from 0) sees [encoded, hidden]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {f"xyz_encoding_{i + 1}.0": (width if i else 63, width) for i in range(depth)}
    sizes[f"xyz_encoding_{skip + 1}.0"] = (width + 63, width)
    sizes |= {"xyz_encoding_final": (width, width), "dir_encoding.0": (width + 27, width // 2)}
    sizes |= {"sigma": (width, 1), "rgb.0": (width // 2, 3)}
    state: State = {}
    for name, (wide, units) in sizes.items():
        state[f"{name}.weight"] = torch.randn(units, wide, generator=generator) * (2 / wide) ** 0.5
        state[f"{name}.bias"] = torch.randn(units, generator=generator) * 0.1
    return state


def embed(v: Tensor, octaves: int) -> Tensor:
    """[v, sin v, cos v, sin 2v, cos 2v, ...] (FE-A)."""
    return torch.cat([v, *[f(2.0**k * v) for k in range(octaves) for f in (torch.sin, torch.cos)]], -1)


def truth(state: State, x: Tensor, d: Tensor, skip: int = 4) -> tuple[Tensor, Tensor]:
    """relu(sigma) and rgb of layouts section 5.3 for what the program hands to its embeddings, in float64."""

    def layer(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()

    e = embed(x.double(), 10)
    h = e
    for i in range(sum(k.startswith("xyz_encoding_") and k.endswith(".0.weight") for k in state)):
        h = torch.relu(layer(f"xyz_encoding_{i + 1}.0", torch.cat([e, h], -1) if i == skip else h))
    y = torch.cat([layer("xyz_encoding_final", h), embed(d.double(), 4)], -1)
    rgb = torch.sigmoid(layer("rgb.0", torch.relu(layer("dir_encoding.0", y))))
    return torch.relu(layer("sigma", h))[:, 0], rgb


def save(path: Path, fine: State | None, coarse: State | None, hyper: Any = None, **more: Any) -> Path:
    state = {f"nerf_fine.{k}": t for k, t in (fine or {}).items()}
    state |= {f"nerf_coarse.{k}": t for k, t in (coarse or {}).items()}
    value: dict[str, Any] = {"epoch": 15, "global_step": 500000, "state_dict": state, **more}
    if hyper is not None:
        value["hyper_parameters"] = hyper
    torch.save(value, path)
    return path


def points(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    d = torch.randn(n, 3, generator=generator)
    return torch.rand(n, 3, generator=generator) * 1.6 - 0.8, d / d.norm(dim=1, keepdim=True)


BLENDER = {"dataset_name": "blender", "img_wh": [800, 800], "root_dir": "lego"}
LLFF = {"dataset_name": "llff", "img_wh": [504, 378], "spheric_poses": False}


def test_it_is_the_function_of_its_program(tmp_path: Path) -> None:
    fine, coarse = network(1), network(2)
    parts = read(save(tmp_path / "a.ckpt", fine, coarse, BLENDER, optimizer_states=[{"state": {}}]))
    x, d = points()
    sigma, rgb = ask(parts, x, d)
    expected = truth(fine, x, d)
    assert (expected[0] > 0).any()
    torch.testing.assert_close(sigma, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rgb, expected[1], rtol=1e-4, atol=1e-5)
    assert (parts.config["has_coarse"], parts.config["skips"]) == (True, [3])
    assert (parts.scene.near, parts.scene.far, parts.scene.background) == (2.0, 6.0, (1.0, 1.0, 1.0))
    assert parts.scene.assumed == ("box",)
    assert parts.provenance["epoch"] == 15
    assert any("optimizer_states" in n for n in parts.notes)


def test_in_ndc_the_direction_is_the_warped_one(tmp_path: Path) -> None:
    """x = o' + t d' and d' by layouts section 9.2 for rays of several cameras; the field gets x and the world's d."""
    fine = network(5)
    hyper = argparse.Namespace(**LLFF)
    parts = read(save(tmp_path / "fern.ckpt", fine, network(6), hyper), ReadOptions(extra=FOCAL))
    space = parts.scene.ray_space
    assert (space.kind, space.width, space.height, space.focal, space.near) == ("ndc", 504.0, 378.0, 407.5, 1.0)
    assert (parts.scene.near, parts.scene.far, parts.scene.background) == (0.0, 1.0, (0.0, 0.0, 0.0))
    generator = torch.Generator().manual_seed(1)
    o = torch.rand(200, 3, generator=generator, dtype=torch.float64) * 0.4 - 0.2
    across = torch.rand(200, 2, generator=generator, dtype=torch.float64) * 0.8 - 0.4
    d = torch.nn.functional.normalize(torch.cat([across, -torch.ones(200, 1, dtype=torch.float64)], 1), dim=1)
    o = o - ((1 + o[:, 2]) / d[:, 2])[:, None] * d  # onto the near plane z = -1
    sx, sy = 2 * 407.5 / 504, 2 * 407.5 / 378
    start = torch.stack([-sx * o[:, 0] / o[:, 2], -sy * o[:, 1] / o[:, 2], 1 + 2 / o[:, 2]], 1)
    warped = torch.stack(
        [
            -sx * (d[:, 0] / d[:, 2] - o[:, 0] / o[:, 2]),
            -sy * (d[:, 1] / d[:, 2] - o[:, 1] / o[:, 2]),
            -2 / o[:, 2],
        ],
        1,
    )
    t = torch.rand(200, 1, generator=generator, dtype=torch.float64) * 0.9
    x = start + t * warped
    inside = (x.abs() < torch.tensor(parts.scene.box.max, dtype=torch.float64)).all(1)
    assert inside.sum() > 100
    x, d, warped = x[inside], d[inside], warped[inside]
    sigma, rgb = ask(parts, x.float(), d.float())
    expected = truth(fine, x, warped)
    torch.testing.assert_close(sigma, expected[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rgb, expected[1], rtol=1e-3, atol=1e-4)
    assert (rgb - truth(fine, x, d)[1]).abs().max() > 0.01  # the un-warped direction would be another answer


def test_many_directions_a_point_in_ndc(tmp_path: Path) -> None:
    parts = read(save(tmp_path / "a.ckpt", network(5), None, LLFF), ReadOptions(extra=FOCAL))
    tensors = {k: torch.from_numpy(t.numpy().copy()) for k, t in parts.tensors.items()}
    field = default().architecture("nerf").load(dict(parts.config), tensors, parts.scene)
    x, d = points(20)
    d[:, 2] = -d[:, 2].abs() - 0.2
    many = torch.stack([d, d.roll(1, 0)], 1)
    with torch.no_grad():
        latent = field.encode(x)
        both = field.color(latent, many)
    for k in (0, 1):
        torch.testing.assert_close(both[:, k], field(x, many[:, k])[1], rtol=1e-5, atol=1e-6)
    x.requires_grad_(True)  # the road with gradients
    torch.testing.assert_close(field(x, d)[1], both[:, 0], rtol=1e-5, atol=1e-6)


def test_what_no_file_says_is_asked_for(tmp_path: Path) -> None:
    net = network()
    path = save(tmp_path / "a.ckpt", net, net, LLFF)
    with pytest.raises(InputError, match=r"a\.ckpt: nerf-pl.*focal.*--extra focal=PIXELS of the 504 x 378"):
        read(path)
    path = save(tmp_path / "b.ckpt", net, net, {**LLFF, "spheric_poses": True})
    with pytest.raises(InputError, match=r"--bounds.*--near and --far"):
        read(path)
    given = ReadOptions(Box.cube(2.0), None, 0.5, 4.0)
    scene = read(path, given).scene
    assert (scene.box, scene.near, scene.far, scene.ray_space.kind) == (Box.cube(2.0), 0.5, 4.0, "world")
    bare = tmp_path / "bare.ckpt"
    torch.save({f"nerf_fine.{k}": t for k, t in net.items()}, bare)
    parts = read(bare)
    assert parts.scene.assumed == ("box", "background", "near", "far")
    assert any("only nerf_fine" in n for n in parts.notes)
    named = ReadOptions(extra={"dataset_name": "llff", **FOCAL})
    assert read(bare, named).scene.ray_space.kind == "ndc"


def test_older_checkpoints_keep_hparams(tmp_path: Path) -> None:
    net = network()
    path = save(tmp_path / "a.ckpt", net, net, hparams={**LLFF, "img_wh": (1008, 756)}, hparams_type="Namespace")
    assert read(path, ReadOptions(extra=FOCAL)).scene.ray_space.width == 1008.0


def test_other_tensors_are_noted_or_refused(tmp_path: Path) -> None:
    net = network()
    path = save(tmp_path / "a.ckpt", net, None, BLENDER, lpips={"weight": torch.zeros(3)})
    assert any("lpips.weight" in n and "left out" in n for n in read(path).notes)
    path = save(tmp_path / "b.ckpt", {**net, "beta.weight": torch.zeros(1, 2)}, None, BLENDER)
    with pytest.raises(InputError, match=r"'beta\.weight' has no place"):
        read(path)
    path = save(tmp_path / "c.ckpt", {k: t for k, t in net.items() if k != "sigma.bias"}, None, BLENDER)
    with pytest.raises(InputError, match=r"nerf_fine: tensor 'sigma\.bias' is missing"):
        read(path)
    path = save(tmp_path / "d.ckpt", {**net, "transient_sigma.0.weight": torch.zeros(1, 2)}, None, BLENDER)
    match = probe(open_manifest(path))
    assert match is not None
    assert match.score < 0.3
    path = save(tmp_path / "e.ckpt", None, None, BLENDER)
    with pytest.raises(InputError, match=r"nerf_fine\.xyz_encoding_1\.0\.weight"):
        default().format("nerf-pl").read(open_manifest(path), ReadOptions())
    path = save(tmp_path / "f.ckpt", {**net, "dir_encoding.0.weight": torch.zeros(12, 50)}, None, BLENDER)
    with pytest.raises(InputError, match=r"dir_encoding\.0\.weight.*26 columns"):
        read(path)


def test_no_other_file_is_claimed(data_root: Path) -> None:
    for path in sorted((data_root / "checkpoints").rglob("*")):
        if path.is_file() and path.suffix in (".tar", ".pt", ".pth", ".th", ".ckpt") and path.parent.name != "refuse":
            assert probe(open_manifest(path)) is None
