"""AAAI2023-PVD: the program's own vm file with its oracle; the other kinds against layouts section 8 in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, RequestError
from pvdconvert.loading import Loaded, open_field
from pvdconvert.plugin import ArrayTensor, Parts, ReadOptions
from pvdconvert.scene import Box, Scene
from pvdconvert_formats.aaai2023_pvd import Aaai2023Pvd, probe
from tests.peers import check_points, check_views, oracle

FORMAT = Aaai2023Pvd()
ARGS = """('PE', 10)
('bound', 1.0)
('just_train_a_model', True)
('plenoxel_res', '[128,128,128]')
('scale', 0.8)
('sigma_clip_max', 7)
('sigma_clip_min', -2)
('workspace', 'a (b)')
PSNR 30.1
"""


def occupied(bits: NDArray[np.uint8], x: NDArray[Any], bound: float = 1.0) -> NDArray[np.bool_]:
    """Whether the renderer emits a sample at ``x`` [N, 3], bit by bit from layouts 8.4."""
    count = bits.size * 8 // 128**3
    flat = np.unpackbits(bits, bitorder="little")
    out = np.zeros(len(x), bool)
    for k, p in enumerate(np.clip(x.astype(np.float64), -bound, bound)):
        level = min(max(int(np.frexp(np.abs(p).max())[1]), 0), count - 1)
        half = min(2.0**level, bound)
        cell = np.clip((0.5 * (p / half + 1) * 128).astype(int), 0, 127)
        index = 0
        for axis in range(3):
            for bit in range(7):
                index |= (int(cell[axis]) >> bit & 1) << (3 * bit + axis)
        out[k] = flat[level * 128**3 + index]
    return out


# ----------------------------------------------------------------------------------------------- the peer's own file


@pytest.fixture(scope="module")
def vm(data_root: Path) -> tuple[Loaded, dict[str, NDArray[Any]]]:
    folder = data_root / "checkpoints" / "peers" / "PVD"
    return open_field(folder / "vm"), oracle(folder / "oracle_vm.npz")


@pytest.mark.requires_data
def test_the_peers_points(vm: tuple[Loaded, dict[str, NDArray[Any]]], data_root: Path) -> None:
    """The oracle asked the network everywhere; the renderer asks it in occupied cells only."""
    loaded, truth = vm
    assert (loaded.format, loaded.architecture) == ("aaai2023-pvd", "tensorf")
    file = data_root / "checkpoints" / "peers" / "PVD" / "vm" / "checkpoints" / "vm_ep0001.pth"
    model = torch.load(file, weights_only=True)["model"]
    shown = occupied(model["density_bitfield"].numpy(), truth["x"])
    assert 0.3 < shown.mean() < 0.7
    train = model["aabb_train"].numpy()
    beyond = shown & ((truth["x"] < train[:3]) | (truth["x"] > train[3:])).any(1)
    assert beyond.any()  # density exp(0) beyond aabb_train, and shown
    check_points(loaded, {**truth, "sigma": np.where(shown, truth["sigma"], 0.0)})


@pytest.mark.requires_data
@pytest.mark.slow
def test_the_peers_views(vm: tuple[Loaded, dict[str, NDArray[Any]]]) -> None:
    loaded, truth = vm
    to_scene = np.array([[0, 0.8, 0, 0], [0, 0, 0.8, 0], [0.8, 0, 0, 0], [0, 0, 0, 1]])  # p = 0.8 (y, z, x) of the file
    np.testing.assert_allclose(np.linalg.inv(to_scene), loaded.scene.world)
    check_views(loaded, truth, c2w="view{}_c2w_file", to_scene=to_scene, step=loaded.scene.step)


@pytest.mark.requires_data
def test_a_file_of_distill_mutual_cuts_colour_features(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "checkpoints" / "peers" / "PVD" / "vm"
    other = tmp_path / "other.txt"
    other.write_text("('sigma_clip_max', 6.5)\n('stage_iters', '{}')\n")
    manifest = open_manifest(folder / "checkpoints" / "vm_ep0001.pth")
    own, distilled = (FORMAT.read(manifest, ReadOptions(config=c)).config for c in (None, other))
    assert own["density_clip"] == [-2.0, 7.0]
    assert "feature_clip" not in own
    assert distilled["density_clip"] == distilled["feature_clip"] == [-2.0, 6.5]
    other.write_text("nothing\n")
    with pytest.raises(InputError, match=r"not an args\.txt"):
        FORMAT.read(manifest, ReadOptions(config=other))


@pytest.mark.requires_data
def test_the_peers_file_is_written_back_bit_for_bit(data_root: Path, tmp_path: Path) -> None:
    path = data_root / "checkpoints" / "peers" / "PVD" / "vm" / "checkpoints" / "vm_ep0001.pth"
    parts = FORMAT.read(open_manifest(path), ReadOptions())
    FORMAT.write(parts, tmp_path / "vm.pth")
    ours, theirs = (torch.load(p, weights_only=True) for p in (tmp_path / "vm.pth", path))
    assert ours["resolution"] == theirs["resolution"]
    assert ours["global_step"] == theirs["global_step"]
    assert ours["model"].keys() == theirs["model"].keys()
    for key in set(theirs["model"]) - {"density_grid", "step_counter"}:
        assert torch.equal(ours["model"][key], theirs["model"][key]), key
    grid = ours["model"]["density_grid"].numpy()
    threshold = min(float(grid.clip(0).mean()), 10.0)  # 8.4: how the program makes its bits of the grid
    np.testing.assert_array_equal(
        np.packbits(grid[0] > threshold, bitorder="little"), theirs["model"]["density_bitfield"]
    )
    back = FORMAT.read(open_manifest(tmp_path / "vm.pth"), ReadOptions())
    assert back.config == parts.config


# ------------------------------------------------------------------------------- known answers of the other kinds


def random(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def bitfield(share: float = 0.5) -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.packbits(rng.random(128**3) < share, bitorder="little"))


def boxes(train: list[float] | None = None, bound: float = 1.0) -> dict[str, Tensor]:
    cube = torch.tensor([-bound] * 3 + [bound] * 3)
    return {"aabb_train": cube if train is None else torch.tensor(train), "aabb_infer": cube}


def nets(features: int) -> dict[str, Tensor]:
    return {
        "sigma_net.0.weight": random(64, features, scale=0.4),
        "sigma_net.1.weight": random(16, 64, scale=0.5),
        "color_net.0.weight": random(64, 31, scale=0.3),
        "color_net.1.weight": random(64, 64, scale=0.2),
        "color_net.2.weight": random(3, 64, scale=0.3),
    }


OFFSETS = [0, 4920, 20552, 63432, 196088, *(585112 + 524288 * k for k in range(10))]
"""First rows for bound 1: (ceil(16 b^l) + 1)^3 rounded up to a multiple of 8, at most 2^19; b = 128^(1/13).

5 303 704 in all, as layouts 8.2 has it."""


def hash_model() -> dict[str, Tensor]:
    return boxes() | {
        "density_bitfield": bitfield(),
        "encoder.embeddings": random(OFFSETS[-1], 2),
        "encoder.offsets": torch.tensor(OFFSETS, dtype=torch.int32),
        **nets(28),
    }


def mlp_model(wide: int = 72, count: int = 6) -> dict[str, Tensor]:
    out = boxes() | {"density_bitfield": bitfield(), **nets(28)}
    for k in range(count):
        shape = (28 if k == count - 1 else wide, 63 if k == 0 else wide + 63 * (k == 4))
        out |= {f"nerf_mlp.{k}.weight": random(*shape, scale=1.5 / shape[1] ** 0.5, seed=k),
                f"nerf_mlp.{k}.bias": random(shape[0], scale=0.1, seed=k)}  # fmt: skip
    return out


def saved(folder: Path, model: dict[str, Any], args: str | None = ARGS, **top: Any) -> Path:
    path = folder / "checkpoints" / "model_ep0001.pth"
    path.parent.mkdir(exist_ok=True)
    stats = {"loss": [0.1], "results": [np.float64(0.5)]}
    torch.save({"epoch": 1, "global_step": 9, "stats": stats, "mean_count": 0, "model": model, **top}, path)
    if args is not None:
        (folder / "args.txt").write_text(args)
    return path


def queries(count: int = 700) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.rand(count, 3, generator=g) * 2 - 1
    return x, F.normalize(torch.randn(count, 3, generator=g), dim=-1)


def harmonics(d: Tensor) -> Tensor:
    """The first 16 rows of the table in layouts 0.3."""
    x, y, z = d.unbind(-1)
    c = [0.28209479177387814, 0.48860251190291987, 1.0925484305920792, 0.59004358992664352]
    rows = [torch.full_like(x, c[0]), -c[1] * y, c[1] * z, -c[1] * x, c[2] * x * y, -c[2] * y * z,
            0.94617469575755997 * z * z - 0.31539156525251999, -c[2] * x * z, 0.54627421529603959 * (x * x - y * y),
            c[3] * y * (-3 * x * x + y * y), 2.8906114426405538 * x * y * z, 0.45704579946446572 * y * (1 - 5 * z * z),
            0.3731763325901154 * z * (5 * z * z - 3), 0.45704579946446572 * x * (1 - 5 * z * z),
            1.4453057213202769 * z * (x * x - y * y), c[3] * x * (-x * x + 3 * y * y)]  # fmt: skip
    return torch.stack(rows, -1)


def heads(m: dict[str, Tensor], f: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """8.3, "hash, mlp" and "others": density and colour of features ``f`` [N, 28]."""
    h = F.relu(f @ m["sigma_net.0.weight"].double().T) @ m["sigma_net.1.weight"].double().T
    c = torch.cat([harmonics(d), h[:, 1:]], 1)
    for k in range(3):
        c = (F.relu(c) if k else c) @ m[f"color_net.{k}.weight"].double().T
    return h[:, 0].clamp(-2, 7).exp(), c.sigmoid()


def grid_features(m: dict[str, Tensor], x: Tensor) -> Tensor:
    """8.3, "hash": torch-ngp's grid of 2.1 with 14 levels, one corner at a time, in float64."""
    u, table = (x.numpy() + 1) / 2, m["encoder.embeddings"].double().numpy()
    out = np.zeros((len(u), 28))
    for level in range(14):
        first, size = OFFSETS[level], OFFSETS[level + 1] - OFFSETS[level]
        scale = float(np.float32(np.exp2(np.float32(level * np.float32(7 / 13)))) * 16 - 1)
        side = int(np.ceil(scale)) + 2
        pos = u * scale + 0.5
        cell = np.floor(pos).astype(np.int64)
        f = pos - cell
        for corner in np.ndindex(2, 2, 2):
            at = cell + corner
            weight = np.prod(np.where(corner, f, 1 - f), 1)
            if side**3 <= size:
                row = at[:, 0] + side * at[:, 1] + side * side * at[:, 2]
            else:
                row = (at[:, 0] ^ at[:, 1] * 2654435761 ^ at[:, 2] * 805459861) & 0xFFFFFFFF
            out[:, 2 * level : 2 * level + 2] += weight[:, None] * table[first + row % size]
    return torch.from_numpy(out)


def mlp_features(m: dict[str, Tensor], x: Tensor) -> Tensor:
    """8.3, "mlp": ReLU between layers, [encoded, hidden] after layer 3."""
    e = torch.cat([x, *(wave(2.0**k * x) for k in range(10) for wave in (torch.sin, torch.cos))], 1)
    h, count = e, sum(k.startswith("nerf_mlp") for k in m) // 2
    for k in range(count):
        h = h @ m[f"nerf_mlp.{k}.weight"].double().T + m[f"nerf_mlp.{k}.bias"].double()
        h = F.relu(h) if k < count - 1 else h
        h = torch.cat([e, h], 1) if k == 3 else h
    return h


def check(path: Path, m: dict[str, Tensor], expected: tuple[Tensor, Tensor], x: Tensor, d: Tensor) -> Loaded:
    """Density where the bitfield is set, 0 elsewhere; colour; and both cuts of the log-density are reached."""
    loaded = open_field(path)
    sigma, rgb = expected
    shown = occupied(m["density_bitfield"].numpy(), x.numpy())
    assert 0.3 < shown.mean() < 0.7
    assert float(sigma.min()) == pytest.approx(np.exp(-2.0))
    truth = {"x": x.numpy(), "d": d.numpy(), "sigma": sigma.numpy() * shown, "rgb": rgb.numpy()}
    check_points(loaded, truth)
    assert loaded.scene.box == Box.cube(1.0)
    assert loaded.scene.background == (1.0, 1.0, 1.0)
    return loaded


def test_hash(tmp_path: Path) -> None:
    m = hash_model()
    x, d = queries()
    loaded = check(saved(tmp_path, m), m, heads(m, grid_features(m, x), d.double()), x, d)
    assert loaded.architecture == "ngp"
    assert loaded.parts.config["per_level_scale"] == pytest.approx(2 ** (7 / 13), rel=1e-14)


@pytest.mark.parametrize(("wide", "count"), [(72, 6), (40, 8)])
def test_mlp(tmp_path: Path, wide: int, count: int) -> None:
    """Also narrower than sigma_net: then every layer is widened by units that stay 0."""
    m = mlp_model(wide, count)
    x, d = queries()
    loaded = check(saved(tmp_path, m), m, heads(m, mlp_features(m, x.double()), d.double()), x, d)
    assert loaded.architecture == "nerf"
    assert loaded.parts.config["depth"] == count


def test_tensors(tmp_path: Path) -> None:
    """8.3, "tensors": axes z, y, x; zero padding, so that density is exp(0) beyond aabb_train where the bits say so."""
    m = volume_model()
    x, d = queries(3000)
    low, high = m["aabb_train"][:3].double(), m["aabb_train"][3:].double()
    at = 2 * (x.double() - low) / (high - low) - 1
    v = F.grid_sample(m["tensor_volume.0"].double(), at[None, None, None], align_corners=True)[0, :, 0, 0].T
    rgb = (v[:, 1:].view(-1, 3, 9) * harmonics(d.double())[:, None, :9]).sum(-1).sigmoid()
    loaded = check(saved(tmp_path, m), m, (v[:, 0].clamp(-2, 7).exp(), rgb), x, d)
    assert loaded.architecture == "plenoxels"
    far = ((x < low) | (x > high)).any(1).numpy() & occupied(m["density_bitfield"].numpy(), x.numpy())
    with torch.no_grad():
        sigma = loaded.field.density(loaded.field.encode(x))[torch.from_numpy(far)]
    assert float((sigma - 1).abs().median()) < 1e-5


@pytest.mark.parametrize("bound", [2.0, 3.0])
def test_larger_bounds_have_several_bitfields(tmp_path: Path, bound: float) -> None:
    """8.4: a point is looked up in the finest cascade that contains it; bound 3 has cubes of half side 1, 2 and 3."""
    cascades = 1 + int(np.ceil(np.log2(bound)))
    bits = np.random.default_rng(1).random(cascades * 128**3) < 0.5
    field = torch.from_numpy(np.packbits(bits, bitorder="little"))
    m = volume_model() | boxes([-1.5, -2.0, -1.4, 1.5, 1.9, 1.25], bound) | {"density_bitfield": field}
    x, d = (v[:1500] for v in queries(1500))
    x = x * bound
    low, high = m["aabb_train"][:3].double(), m["aabb_train"][3:].double()
    at = 2 * (x.double() - low) / (high - low) - 1
    v = F.grid_sample(m["tensor_volume.0"].double(), at[None, None, None], align_corners=True)[0, :, 0, 0].T
    rgb = (v[:, 1:].view(-1, 3, 9) * harmonics(d.double())[:, None, :9]).sum(-1).sigmoid()
    shown = occupied(field.numpy(), x.numpy(), bound)
    sigma = v[:, 0].clamp(-2, 7).exp().numpy() * shown
    loaded = open_field(saved(tmp_path, m))
    check_points(loaded, {"x": x.numpy(), "d": d.numpy(), "sigma": sigma, "rgb": rgb.numpy()})
    assert loaded.scene.box == Box.cube(bound)


def test_tensors_keep_only_what_shows(tmp_path: Path) -> None:
    """One set cell: the eight vertices around it, or those of all lattice cells that it touches."""
    bits = np.zeros(128**3, np.uint8)
    bits[0] = 1  # cell (0, 0, 0): from -1 to -0.984, outside of aabb_train
    m = volume_model() | {"density_bitfield": torch.from_numpy(np.packbits(bits, bitorder="little"))}
    parts = FORMAT.read(open_manifest(saved(tmp_path, m)), ReadOptions())
    assert parts.tensors["vertices"].shape == (8, 3)
    assert not parts.tensors["density_data"].numpy().any()
    bare = {k: v for k, v in m.items() if k != "density_bitfield"}
    parts = FORMAT.read(open_manifest(saved(tmp_path, bare)), ReadOptions())
    assert parts.tensors["vertices"].shape[0] == np.prod(parts.config["shape"])
    box = Box.from_json(parts.config["box"])
    assert all(a <= -1 for a in box.min)
    assert all(b >= 1 for b in box.max)
    assert any("density_bitfield" in note for note in parts.notes)


# ----------------------------------------------------------------------------------- what is asked for, and refusals


def test_args_in_other_places(tmp_path: Path) -> None:
    """Beside the file, in the folder above, given, or nowhere: then the program's defaults, said so."""
    path = saved(tmp_path, mlp_model(), args=None)
    nowhere = FORMAT.read(open_manifest(path), ReadOptions())
    assert {"sigma_clip", "world"} <= set(nowhere.scene.assumed)
    assert any("sigma_clip" in note for note in nowhere.notes)
    assert nowhere.config["density_clip"] == [-2.0, 7.0]
    (tmp_path / "args.txt").write_text(ARGS.replace("-2", "-3"))
    above = FORMAT.read(open_manifest(path), ReadOptions())
    assert above.config["density_clip"] == [-3.0, 7.0]
    assert above.scene.world[0] == (0.0, 0.0, 1.25, 0.0)
    assert "sigma_clip" not in above.scene.assumed
    (path.parent / "args.txt").write_text(ARGS.replace("-2", "-4").replace("0.8", "0.5"))
    beside = FORMAT.read(open_manifest(path), ReadOptions())
    assert beside.config["density_clip"] == [-4.0, 7.0]
    assert beside.scene.world[0] == (0.0, 0.0, 2.0, 0.0)
    assert FORMAT.read(open_manifest(path), ReadOptions(config=tmp_path / "args.txt")).config == above.config


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ("('enable_edit_plenoxel', True)", "enable_edit_plenoxel"),
        ("('sigma_clip_min', 9)", "sigma_clip_min"),
        ("('sigma_clip_min', 'low')", "sigma_clip_min"),
        ("('scale', __import__('os'))", "no line is"),
        ("('scale', -1)", "scale is -1"),
        ("('x', " + "(" * 3000 + ")", "no line is"),
    ],
)
def test_bad_arguments(tmp_path: Path, args: str, match: str) -> None:
    path = saved(tmp_path, mlp_model(), args=args)
    with pytest.raises(InputError, match=match) as caught:
        FORMAT.read(open_manifest(path), ReadOptions())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "changes", "match"),
    [
        ("mlp", {"aabb_infer": None}, "aabb_infer.*missing"),
        ("mlp", {"aabb_infer": torch.tensor([-1.0, -1, -1, 1, 1, 2])}, "no cube"),
        ("mlp", {"aabb_train": torch.zeros(6)}, "aabb_train"),
        ("mlp", {"nerf_mlp.2.bias": None}, r"nerf_mlp\.2\.bias.*missing"),
        ("mlp", {"nerf_mlp.2.weight": torch.zeros(72, 70)}, r"nerf_mlp\.2\.weight.*\[\*, 72\]"),
        (
            "mlp",
            {"nerf_mlp.2.weight": torch.zeros(71, 72), "nerf_mlp.2.bias": torch.zeros(71)},
            r"nerf_mlp\.2\.weight.*\[72, \*\]",
        ),
        ("mlp", {"sigma_net.0.weight": torch.zeros(64, 30)}, r"sigma_net\.0\.weight.*\[\*, 28\]"),
        ("mlp", {"color_net.0.weight": torch.zeros(64, 40)}, r"color_net\.0\.weight.*\[\*, 31\]"),
        ("mlp", {"color_net.2.weight": torch.zeros(4, 64)}, "3 colours"),
        ("mlp", {"other.weight": torch.zeros(3)}, "other.weight"),
        ("mlp", {"density_bitfield": torch.zeros(9, dtype=torch.uint8)}, "density_bitfield"),
        ("vm", {"sigma_mat.1": torch.zeros(1, 16, 9, 5)}, r"sigma_mat\.1"),
        ("vm", {"color_vec.2": torch.zeros(1, 47, 5, 1)}, r"color_vec\.2"),
        ("hash", {"encoder.embeddings": torch.zeros(7, 2)}, r"encoder\.embeddings"),
        ("tensors", {"tensor_volume.0": torch.zeros(1, 27, 4, 4, 4)}, "channels"),
    ],
)
def test_malformed_files(tmp_path: Path, model: str, changes: dict[str, Any], match: str) -> None:
    m = {"mlp": mlp_model, "vm": vm_model, "hash": hash_model, "tensors": volume_model}[model]() | changes
    path = saved(tmp_path, {k: v for k, v in m.items() if v is not None})
    with pytest.raises(InputError, match=match) as caught:
        FORMAT.read(open_manifest(path), ReadOptions())
    assert str(path) in str(caught.value)


def test_probe_leaves_relatives_alone(tmp_path: Path) -> None:
    for m in (mlp_model(), vm_model(), hash_model(), volume_model()):
        match = probe(open_manifest(saved(tmp_path, m)))
        assert match is not None
        assert match.score > 0.9
    torch_ngp = vm_model() | {"basis_mat.weight": torch.zeros(27, 144), "color_net.0.weight": torch.zeros(128, 150)}
    assert probe(open_manifest(saved(tmp_path, torch_ngp))) is None
    grid = hash_model() | {"encoder.offsets": torch.zeros(17), "sigma_net.0.weight": torch.zeros(64, 32)}
    assert probe(open_manifest(saved(tmp_path, grid))) is None
    odd = probe(open_manifest(saved(tmp_path, mlp_model() | {"deform.0.weight": torch.zeros(3)})))
    assert odd is not None
    assert odd.score < 0.3


def vm_model() -> dict[str, Tensor]:
    out = boxes([-0.5, -0.75, -0.5, 0.5, 0.75, 0.25]) | {"density_bitfield": bitfield()}
    n = (5, 6, 7)
    for i, ((a, b), c) in enumerate((((0, 1), 2), ((0, 2), 1), ((1, 2), 0))):
        for kind, rank in (("sigma", 16), ("color", 48)):
            out |= {f"{kind}_mat.{i}": random(1, rank, n[b], n[a], scale=0.6, seed=i),
                    f"{kind}_vec.{i}": random(1, rank, n[c], 1, scale=0.6, seed=i)}  # fmt: skip
    colour = {k: v for k, v in nets(28).items() if k.startswith("color")}
    return out | {"basis_mat.weight": random(15, 144, scale=0.3), **colour}


def volume_model() -> dict[str, Tensor]:
    return boxes([-0.5, -0.75, -0.4, 0.5, 0.9, 0.25]) | {
        "density_bitfield": bitfield(),
        "tensor_volume.0": random(1, 28, 5, 7, 9, scale=3.0),  # z, y, x
    }


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("kind", ["hash", "vm"])
def test_write_and_read_are_inverse(tmp_path: Path, kind: str) -> None:
    m = hash_model() if kind == "hash" else vm_model()
    parts = FORMAT.read(open_manifest(saved(tmp_path, m)), ReadOptions())
    FORMAT.write(parts, tmp_path / "out.pth")
    FORMAT.write(parts, tmp_path / "again.pth")
    assert (tmp_path / "out.pth").read_bytes() == (tmp_path / "again.pth").read_bytes()
    back = torch.load(tmp_path / "out.pth", weights_only=True)
    assert set(back["stats"]) == {"loss", "valid_loss", "results", "checkpoints", "best_result"}
    for key, value in m.items():
        assert torch.equal(back["model"][key], value), key
        assert back["model"][key].dtype == value.dtype
    (tmp_path / "args.txt").unlink()
    second = FORMAT.read(open_manifest(tmp_path / "out.pth"), ReadOptions())
    assert second.config == parts.config
    assert second.scene.box == parts.scene.box


def test_other_cuts_and_boxes_are_kept_aside(tmp_path: Path) -> None:
    parts = FORMAT.read(open_manifest(saved(tmp_path, vm_model())), ReadOptions())
    config = parts.config | {"density_clip": [-5.0, 8.0], "box": {"min": [-0.51, -0.3, -0.2], "max": [0.5, 0.3, 0.1]}}
    scene = Scene(Box.cube(1.0), background=(0.0, 0.5, 1.0))
    FORMAT.write(Parts("tensorf", config, parts.tensors, scene), tmp_path / "out.pth")
    (tmp_path / "args.txt").unlink()
    back = FORMAT.read(open_manifest(tmp_path / "out.pth"), ReadOptions())
    assert back.config == config
    assert back.scene.background == (0.0, 0.5, 1.0)
    model = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    np.testing.assert_allclose(model["aabb_train"].numpy(), [-0.51, -0.3, -0.2, 0.5, 0.3, 0.1], rtol=1e-7)


@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        ("hash", {"levels": 16}, "levels = 14"),
        ("hash", {"per_level_scale": 1.4}, "finest_resolution=2048"),
        ("hash", {"box": [[-1, -1, -1], [1, 1, 2]]}, "cube of 1"),
        ("hash", {"density_clip": None}, "clips log-density"),
        ("hash", {"bias": True}, "bias = False"),
        ("vm", {"mlp_bias": True}, "mlp_bias"),
        ("vm", {"density_activation": "softplus"}, "density_activation"),
        ("vm", {"feature_clip": [-1.0, 1.0]}, "feature_clip"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path, kind: str, config: dict[str, Any], match: str) -> None:
    m = hash_model() if kind == "hash" else vm_model()
    parts = FORMAT.read(open_manifest(saved(tmp_path, m)), ReadOptions())
    with pytest.raises(RequestError, match=match):
        FORMAT.write(Parts(parts.architecture, {**parts.config, **config}, parts.tensors, parts.scene), tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_scenes_that_the_program_does_not_render_are_refused(tmp_path: Path) -> None:
    parts = FORMAT.read(open_manifest(saved(tmp_path, vm_model())), ReadOptions())
    scene = Scene(Box((-1, -1, -1), (1, 1, 0.5)))
    tensors = {k: t for k, t in parts.tensors.items() if k != "mask.bits"}
    with pytest.raises(RequestError, match="cube around 0"):
        FORMAT.write(Parts("tensorf", parts.config | {"mask": None}, tensors, scene), tmp_path / "o")
    bare = FORMAT.read(open_manifest(saved(tmp_path, vm_model())), ReadOptions())
    FORMAT.write(Parts("tensorf", parts.config | {"mask": None}, tensors, bare.scene), tmp_path / "o")
    model = torch.load(tmp_path / "o", weights_only=True)["model"]
    assert bool((model["density_bitfield"] == 255).all())
    assert FORMAT.read(open_manifest(tmp_path / "o"), ReadOptions()).config.get("mask") is None
    with pytest.raises(RequestError, match="not nerf"):
        FORMAT.write(Parts("nerf", {}, {"a": ArrayTensor(np.zeros(1))}, scene), tmp_path / "o")
