"""DirectVoxGO files: the program's own file with its oracle, and hand-made files against its formulas in float64."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.loading import open_field
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.scene import Box
from pvdconvert_formats._python_config import assignments
from pvdconvert_formats.dvgo import DirectVoxGo, probe
from tests import peers

LOW, HIGH = np.array([-1.1, -0.9, -0.5]), np.array([0.9, 1.2, 0.7])
SHAPE = (7, 6, 5)
BASE = 300
"""num_voxels_base of the hand-made files."""
Arrays = dict[str, NDArray[Any]]


def make(
    *,
    fine: bool = True,
    direct: bool = True,
    channels: int = 6,
    depth: int = 3,
    view: int = 2,
    position: int | None = None,
    old: bool = False,
    mask: tuple[int, int, int] | None = (5, 8, 6),
    factored: bool = False,
) -> dict[str, Any]:
    """A checkpoint with the keys of layouts 6.1 and random values."""
    rng = np.random.default_rng(3)

    def tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.from_numpy((scale * rng.standard_normal(shape)).astype(np.float32))

    channels = channels if fine else 3
    state: dict[str, Any] = {}
    bounds = {"xyz_min": torch.tensor(LOW).float(), "xyz_max": torch.tensor(HIGH).float()}
    state.update(bounds)
    kwargs: dict[str, Any] = {
        "xyz_min": LOW.astype(np.float32), "xyz_max": HIGH.astype(np.float32), "num_voxels": 210,
        "num_voxels_base": BASE, "alpha_init": 1e-2, "voxel_size_ratio": torch.tensor(1.1),
        "mask_cache_path": "logs/coarse_last.tar",
        "mask_cache_thres": 1e-3, "fast_color_thres": 1e-4, "rgbnet_dim": channels if fine else 0,
        "rgbnet_direct": direct, "rgbnet_full_implicit": False, "rgbnet_depth": depth, "rgbnet_width": 16,
        "viewbase_pe": view,
    }  # fmt: skip
    if old:
        state["density"], state["k0"] = tensor(1, 1, *SHAPE, scale=3), tensor(1, channels, *SHAPE)
        kwargs["act_shift"] = np.float64(-3.5)
    else:
        state["act_shift"] = torch.tensor([-2.5])
        for name, width in (("density", 1), ("k0", channels)):
            state |= {f"{name}.{k}": v for k, v in bounds.items()}
            if factored:
                x, y, z = SHAPE
                sizes = {"xy_plane": (1, 2, x, y), "xz_plane": (1, 3, x, z), "yz_plane": (1, 3, y, z),
                         "x_vec": (1, 3, x, 1), "y_vec": (1, 3, y, 1), "z_vec": (1, 2, z, 1)}  # fmt: skip
                state |= {f"{name}.{k}": tensor(*s) for k, s in sizes.items()}
                if width > 1:
                    state[f"{name}.f_vec"] = tensor(8, width)
            else:
                state[f"{name}.grid"] = tensor(1, width, *SHAPE, scale=3 if width == 1 else 1)
    if fine:
        inputs = channels - (0 if direct else 3) + 3 + 6 * view
        state["viewfreq"] = 2.0 ** torch.arange(view)
        if position is not None:
            inputs += 3 + 6 * position
            state["posfreq"] = 2.0 ** torch.arange(position)
        widths = [inputs, *[16] * (depth - 1), 3]
        names = ["rgbnet.0", *(f"rgbnet.{i}.0" for i in range(2, depth)), f"rgbnet.{depth}"]
        for name, a, b in zip(names, widths[:-1], widths[1:]):
            state[f"{name}.weight"], state[f"{name}.bias"] = tensor(b, a, scale=a**-0.5), tensor(b)
    if mask is not None:
        scale = (np.array(mask) - 1) / (HIGH - LOW)
        state["mask_cache.mask"] = torch.from_numpy(rng.random(mask) > 0.4)
        state["mask_cache.xyz2ijk_scale"] = torch.tensor(scale).float()
        state["mask_cache.xyz2ijk_shift"] = torch.tensor(-LOW * scale).float()
    return {"global_step": 20, "model_kwargs": kwargs, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}


def saved(tmp_path: Path, value: Mapping[str, Any], name: str = "fine_last.tar") -> Path:
    path = tmp_path / name
    torch.save(dict(value), path)
    return path


def read(path: Path, options: ReadOptions | None = None) -> Parts:
    return DirectVoxGo().read(open_manifest(path), options or ReadOptions())


# --------------------------------------------------------- the program's forward, in float64, from layouts 6.1 and 10


def trilinear(grid: NDArray[Any], x: NDArray[Any]) -> NDArray[Any]:
    """[N, C] of [C, X, Y, Z], vertices on the faces of the box."""
    last = np.array(grid.shape[1:]) - 1
    at = (x - LOW) / (HIGH - LOW) * last
    i = np.minimum(np.floor(at).astype(int), last - 1)
    f = at - i
    out = np.zeros((len(x), len(grid)))
    for a in (0, 1):
        for b in (0, 1):
            for c in (0, 1):
                w = np.prod(np.where([a, b, c], f, 1 - f), axis=1)
                out += w[:, None] * grid[:, i[:, 0] + a, i[:, 1] + b, i[:, 2] + c].T
    return out


def product_grid(state: Arrays, name: str, x: NDArray[Any]) -> NDArray[Any]:
    """TensoRFGrid at ``x``: planes and lines interpolated apart, then multiplied (not at the vertices)."""
    unit = (x - LOW) / (HIGH - LOW)

    def line(v: NDArray[Any], u: NDArray[Any]) -> NDArray[Any]:
        return np.stack([np.interp(u * (v.shape[2] - 1), np.arange(v.shape[2]), r) for r in v[0, :, :, 0]], axis=1)

    def plane(p: NDArray[Any], u: NDArray[Any], w: NDArray[Any]) -> NDArray[Any]:
        at = w * (p.shape[3] - 1)
        j = np.minimum(np.floor(at).astype(int), p.shape[3] - 2)
        g = at - j
        both = [np.stack([np.interp(u[n] * (p.shape[2] - 1), np.arange(p.shape[2]), r[:, j[n] + s])
                          for n in range(len(u)) for r in p[0]]).reshape(len(u), -1) for s in (0, 1)]  # fmt: skip
        return np.asarray(both[0] * (1 - g)[:, None] + both[1] * g[:, None])

    key = f"{name}.{{}}".format
    parts = [
        plane(state[key("xy_plane")], unit[:, 0], unit[:, 1]) * line(state[key("z_vec")], unit[:, 2]),
        plane(state[key("xz_plane")], unit[:, 0], unit[:, 2]) * line(state[key("y_vec")], unit[:, 1]),
        plane(state[key("yz_plane")], unit[:, 1], unit[:, 2]) * line(state[key("x_vec")], unit[:, 0]),
    ]
    feature = np.concatenate(parts, axis=1)
    return feature @ state[key("f_vec")] if key("f_vec") in state else feature.sum(1, keepdims=True)


def encoding(v: NDArray[Any], freq: NDArray[Any]) -> NDArray[Any]:
    waves = (v[:, :, None] * freq).reshape(len(v), -1)
    return np.concatenate([v, np.sin(waves), np.cos(waves)], axis=1)


def truth(
    checkpoint: Mapping[str, Any], x: NDArray[Any], d: NDArray[Any], stepsize: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(alpha of one step of ``stepsize`` voxels, rgb, whether the mask holds x)."""
    kwargs = checkpoint["model_kwargs"]
    state: Arrays = {k: v.double().numpy() for k, v in checkpoint["model_state_dict"].items()}

    def grid(name: str) -> NDArray[Any]:
        dense = state.get(f"{name}.grid", state.get(name))
        return product_grid(state, name, x) if dense is None else trilinear(dense[0], x)

    voxel, base = ((np.prod(HIGH - LOW) / kwargs[k]) ** (1 / 3) for k in ("num_voxels", "num_voxels_base"))
    shift = state["act_shift"][0] if "act_shift" in state else kwargs["act_shift"]
    alpha = 1 - (1 + np.exp(grid("density")[:, 0] + shift)) ** (-stepsize * voxel / base)
    k0 = grid("k0")
    if "rgbnet.0.weight" in state:
        direct = kwargs["rgbnet_direct"]
        parts = [k0 if direct else k0[:, 3:]]
        if "posfreq" in state:
            parts.append(encoding((x - LOW) / (HIGH - LOW), state["posfreq"]))
        h = np.concatenate([*parts, encoding(d, state["viewfreq"])], axis=1)
        n = kwargs["rgbnet_depth"]
        for name in ["rgbnet.0", *(f"rgbnet.{i}.0" for i in range(2, n))]:
            h = np.maximum(h @ state[f"{name}.weight"].T + state[f"{name}.bias"], 0)
        logit = h @ state[f"rgbnet.{n}.weight"].T + state[f"rgbnet.{n}.bias"] + (0 if direct else k0[:, :3])
    else:
        logit = k0
    held = np.ones(len(x), bool)
    if "mask_cache.mask" in state:
        mask = state["mask_cache.mask"]
        at = x * (np.array(mask.shape) - 1) / (HIGH - LOW) - LOW * (np.array(mask.shape) - 1) / (HIGH - LOW)
        i = np.floor(at + 0.5).astype(int)  # never negative inside of the box
        held = mask[i[:, 0], i[:, 1], i[:, 2]] > 0
    return alpha, 1 / (1 + np.exp(-logit)), held


VARIANTS: dict[str, dict[str, Any]] = {
    "coarse": {"fine": False},
    "coarse without a mask": {"fine": False, "mask": None},
    "direct": {},
    "residual": {"direct": False, "channels": 12, "depth": 4, "view": 4},
    "residual without features": {"direct": False, "channels": 3, "depth": 2},
    "no octaves": {"view": 0},
    "tensorf grids": {"factored": True},
    "2022": {"old": True},
    "2021, positions": {"old": True, "position": 5, "direct": False, "channels": 9},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stepsize", [0.5, 1.0])
def test_every_variant_answers_as_the_program_does(tmp_path: Path, variant: str, stepsize: float) -> None:
    checkpoint = make(**VARIANTS[variant])
    loaded = open_field(saved(tmp_path, checkpoint))
    assert (loaded.format, loaded.architecture) == ("dvgo", "dvgo")
    rng = np.random.default_rng(5)
    x = LOW + rng.random((4000, 3)) * (HIGH - LOW)
    d = rng.standard_normal((4000, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    alpha, rgb, held = truth(checkpoint, x, d, stepsize)
    sigma, color = loaded.field(torch.from_numpy(x).float(), torch.from_numpy(d).float())
    # The length of the step is that many voxels: the field's density is per world unit.
    length = stepsize * (np.prod(HIGH - LOW) / 210) ** (1 / 3)
    mine = 1 - np.exp(-sigma.double().numpy() * length)
    near = np.abs(mine - np.where(held, alpha, 0)) < 2e-5
    assert near.mean() > 0.999  # a point on the border of two cells of the mask may fall to either
    np.testing.assert_allclose(color.double().numpy(), rgb, atol=2e-5)
    assert held.mean() > 0.1 or VARIANTS[variant].get("mask", 0) is None
    outside = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, -0.6]])
    assert loaded.field.density(loaded.field.encode(outside)).tolist() == [0.0, 0.0]


def test_the_support_holds_the_mask(tmp_path: Path) -> None:
    loaded = open_field(saved(tmp_path, make(mask=(9, 11, 8))))
    support = loaded.field.support()
    assert support is not None
    x = torch.from_numpy(LOW + np.random.default_rng(1).random((20000, 3)) * (HIGH - LOW)).float()
    seen = loaded.field.density(loaded.field.encode(x)) > 0
    assert bool(support.contains(x[seen]).all())
    assert 0.2 < float(seen.float().mean()) < 0.9


@pytest.mark.requires_data
def test_the_programs_own_points(data_root: Path) -> None:
    folder = data_root / "checkpoints/peers/DirectVoxGO"
    loaded = open_field(folder / "coarse_last.tar")
    assert loaded.parts.provenance["step"] == 140
    assert loaded.scene.step is not None
    truth_ = peers.oracle(folder / "oracle_coarse.npz")
    assert loaded.scene.step == pytest.approx(float(truth_["step_length"]), rel=1e-5)
    peers.check_points(loaded, truth_)


@pytest.mark.requires_data
@pytest.mark.slow
def test_the_programs_own_views(data_root: Path) -> None:
    folder = data_root / "checkpoints/peers/DirectVoxGO"
    peers.check_views(open_field(folder / "coarse_last.tar"), peers.oracle(folder / "oracle_coarse.npz"))


# ------------------------------------------------------------------------------------------------ scene and settings


def test_background_and_step_come_from_the_runs_config(tmp_path: Path) -> None:
    path = saved(tmp_path, make())
    voxel = float((np.prod(HIGH - LOW) / 210) ** (1 / 3))
    scene = read(path).scene
    assert (scene.background, scene.assumed) == ((1.0, 1.0, 1.0), ("background", "step"))
    assert scene.step == pytest.approx(0.5 * voxel)
    np.testing.assert_allclose([scene.box.min, scene.box.max], [LOW, HIGH], rtol=1e-6)
    text = "import os\nos.abort()\nexpname = 'x'\ndata = dict(datadir='d', white_bkgd=False)\n"
    text += "fine_model_and_render = dict(num_voxels=160**3, stepsize=0.25)\n"
    (tmp_path / "config.py").write_text(text)
    parts = read(path)
    assert (parts.scene.background, parts.scene.assumed) == ((0.0, 0.0, 0.0), ())
    assert parts.scene.step == pytest.approx(0.25 * voxel)
    other = tmp_path / "other.py"
    other.write_text("data = dict(white_bkgd=True)\n")
    given = read(path, ReadOptions(config=other)).scene
    assert (given.background, given.assumed) == ((1.0, 1.0, 1.0), ("step",))
    assert read(path, ReadOptions(bounds=Box.cube(0.3))).scene.box == Box.cube(0.3)


def test_settings_are_read_as_data() -> None:
    text = (
        "a = dict(b=160**3, c=[1, -2.5, 'x', None], d={'e': (True,)})\nf = open('x')\ng = 2**10**10\nh = dict(a, b=1)"
    )
    assert assignments(text, "here") == {"a": {"b": 4096000, "c": [1, -2.5, "x", None], "d": {"e": [True]}}}
    with pytest.raises(InputError, match="here: cannot be read as Python"):
        assignments("a = (", "here")


# ------------------------------------------------------------------------------------------------ what is refused


def broken(key: str, value: Any = None, *, kwargs: bool = False, **options: Any) -> dict[str, Any]:
    checkpoint = make(**options)
    inner = checkpoint["model_kwargs" if kwargs else "model_state_dict"]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return checkpoint


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        (broken("scene_center", torch.zeros(3)), "unbounded model"),
        (broken("act_shift.grid", torch.zeros(1, 1, 1, 1, 4)), "forward-facing model"),
        (broken("in_act_density", True, kwargs=True), "in_act_density"),
        (broken("rgbnet_full_implicit", True, kwargs=True), "cannot render"),
        (broken("mask_cache.density", torch.zeros(1, 1, 2, 2, 2)), "before 2022"),
        (broken("num_voxels_base", kwargs=True), "num_voxels_base"),
        (broken("rgbnet_direct", False, kwargs=True), "rgbnet_direct is False"),
        (broken("xyz_max"), "'xyz_max'"),
        (broken("k0.xyz_min", torch.ones(3)), "'k0.xyz_min'"),
        (broken("k0.grid"), "'k0.grid' is missing"),
        (broken("k0.grid", torch.zeros(1, 6, 3, 3, 3)), "not one lattice"),
        (broken("rgbnet.2.0.weight"), "layers"),
        (broken("rgbnet.3.weight", torch.zeros(3, 5)), "'rgbnet.3.weight'"),
        (broken("viewfreq", torch.tensor([1.0, 3.0])), "powers of two"),
        (broken("viewfreq"), "'viewfreq'"),
        (broken("mask_cache.mask", torch.zeros(3)), "mask_cache.mask"),
        (broken("mask_cache.xyz2ijk_scale"), "xyz2ijk_scale"),
        (broken("density.z_vec", torch.zeros(1, 9, 5, 1), factored=True), "do not fit"),
        (broken("density.z_vec", factored=True), "'density.z_vec'"),
        (broken("alpha_init", 2.0, kwargs=True, old=True) | {}, ""),
        (broken("extra.weight", torch.zeros(2)), "'extra.weight' has no place"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, checkpoint: dict[str, Any], words: str) -> None:
    path = saved(tmp_path, checkpoint)
    match = probe(open_manifest(path))
    if not words:  # act_shift stands in the file: alpha_init is not asked
        assert read(path).config["act_shift"] == -3.5
        del checkpoint["model_kwargs"]["act_shift"]
        path, words = saved(tmp_path, checkpoint), "alpha_init"
    assert match is not None
    with pytest.raises(InputError, match=words) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_colours_need_a_network_or_three_channels(tmp_path: Path) -> None:
    checkpoint = make(depth=2)
    for key in [k for k in checkpoint["model_state_dict"] if k.startswith("rgbnet")]:
        del checkpoint["model_state_dict"][key]
    with pytest.raises(InputError, match="no 'rgbnet'"):
        read(saved(tmp_path, checkpoint))


def test_alpha_init_serves_where_no_shift_is_stored(tmp_path: Path) -> None:
    """ln(1 / (1 - 0.01) - 1) = ln(0.010101...) = -4.59512."""
    checkpoint = make(old=True)
    del checkpoint["model_kwargs"]["act_shift"]
    assert read(saved(tmp_path, checkpoint)).config["act_shift"] == pytest.approx(-4.59512, abs=1e-5)


def test_other_files_with_a_model_state_dict_are_not_claimed(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model_state_dict": {"net.weight": torch.zeros(3, 3)}, "epoch": 1}, "other.pt")
    match = probe(open_manifest(path))
    assert match is None or match.score < 0.3
