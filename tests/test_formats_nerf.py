"""The vanilla-NeRF family: each layout is written from its program's own network, read, and compared point by point."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError, PvdError
from pvdconvert.identify import identify
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Box


def read(path: Path, options: ReadOptions | None = None) -> Parts:
    found = identify(path)
    return default().format(found.format).read(found.manifest, options or ReadOptions())


def ask(parts: Parts, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Density and colour of the field that the core builds from ``parts``."""
    tensors = {k: torch.from_numpy(t.numpy().copy()) for k, t in parts.tensors.items()}
    field = default().architecture(parts.architecture).load(parts.config, tensors, parts.scene)
    with torch.no_grad():
        sigma, rgb = field(x, d)
    return sigma, rgb


def points(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    d = torch.randn(n, 3, generator=generator)
    return torch.rand(n, 3, generator=generator) * 1.6 - 0.8, d / d.norm(dim=1, keepdim=True)


def fourier(x: Tensor, octaves: int) -> Tensor:
    """[x, sin x, cos x, sin 2x, cos 2x, ...]: the paper's code."""
    return torch.cat([x, *[f(2.0**k * x) for k in range(octaves) for f in (torch.sin, torch.cos)]], -1)


# ------------------------------------------------------------------------------------------------- bmild


def keras(
    depth: int = 8, width: int = 32, skip: int = 4, views: bool = True, seed: int = 0
) -> list[NDArray[np.float32]]:
    """Kernels [in, out] and biases in the order of bmild's model.get_weights()."""
    rng = np.random.default_rng(seed)
    shapes = [(63, width)] + [(width + 63 * (i - 1 == skip), width) for i in range(1, depth)]
    shapes += [(width, 256), (256 + 27, width // 2), (width // 2, 3), (width, 1)] if views else [(width, 4)]
    out: list[NDArray[np.float32]] = []
    for rows, columns in shapes:
        out += [rng.normal(size=(rows, columns), scale=(2 / rows) ** 0.5).astype(np.float32)]
        out += [rng.normal(size=columns, scale=0.1).astype(np.float32)]
    return out


def save_keras(path: Path, weights: list[NDArray[np.float32]]) -> Path:
    array = np.empty(len(weights), object)
    array[:] = weights
    np.save(path, array, allow_pickle=True)
    return path


def run_keras(weights: list[NDArray[np.float32]], x: Tensor, d: Tensor, skip: int = 4) -> tuple[Tensor, Tensor]:
    """run_nerf_helpers.init_nerf_model's forward, in float64."""
    layer = [torch.from_numpy(w).double() for w in weights]
    views = len(layer[-1]) == 1
    depth = len(layer) // 2 - (4 if views else 1)
    e = fourier(x.double(), 10)
    h = e
    for i in range(depth):
        h = torch.relu(h @ layer[2 * i] + layer[2 * i + 1])
        if i == skip and i < depth - 1:
            h = torch.cat([e, h], -1)
    rest = layer[2 * depth :]
    if not views:
        out = h @ rest[0] + rest[1]
        return torch.relu(out[:, 3]), torch.sigmoid(out[:, :3])
    feature = torch.cat([h @ rest[0] + rest[1], fourier(d.double(), 4)], -1)
    rgb = torch.sigmoid(torch.relu(feature @ rest[2] + rest[3]) @ rest[4] + rest[5])
    return torch.relu(h @ rest[6] + rest[7])[:, 0], rgb


@pytest.mark.parametrize(("depth", "skip", "views"), [(8, 4, True), (4, 9, True), (8, 4, False), (5, 1, False)])
def test_bmild_is_the_function_of_its_program(tmp_path: Path, depth: int, skip: int, views: bool) -> None:
    weights = keras(depth, skip=skip, views=views)
    parts = read(save_keras(tmp_path / "renamed", weights).with_suffix(".npy"))
    x, d = points()
    sigma, rgb = ask(parts, x, d)
    expected_sigma, expected_rgb = run_keras(weights, x, d, skip)
    torch.testing.assert_close(sigma.double(), expected_sigma, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rgb.double(), expected_rgb, rtol=1e-4, atol=1e-5)
    assert (expected_sigma > 0).any()


def test_bmild_pairs(tmp_path: Path) -> None:
    for step in (1000, 20000):
        save_keras(tmp_path / f"model_{step:06d}.npy", keras(seed=step))
        save_keras(tmp_path / f"model_fine_{step:06d}.npy", keras(seed=step + 1))
    fine, coarse = keras(seed=20001), keras(seed=20000)
    folder = read(tmp_path)
    for parts in (folder, read(tmp_path / "model_020000.npy"), read(tmp_path / "model_fine_020000.npy")):
        assert parts.config["has_coarse"]
        assert parts.provenance["step"] == 20000
        np.testing.assert_array_equal(parts.tensors["fine.trunk.0.weight"].numpy(), fine[0].T)
        np.testing.assert_array_equal(parts.tensors["coarse.trunk.5.weight"].numpy(), coarse[10].T)
        np.testing.assert_array_equal(parts.tensors["fine.density.bias"].numpy(), fine[-1])
    assert any("20000 of 1000, 20000" in note for note in folder.notes)
    (tmp_path / "model_fine_020000.npy").unlink()
    alone = read(tmp_path / "model_020000.npy")
    assert not alone.config["has_coarse"]
    assert any("only one network" in note for note in alone.notes)


def test_bmild_leaves_other_lists_in_a_folder_alone(tmp_path: Path) -> None:
    save_keras(tmp_path / "model_000001.npy", keras())
    save_keras(tmp_path / "optimizer_000001.npy", [np.zeros(1, np.float32), *keras()])
    np.save(tmp_path / "times.npy", np.zeros(3))
    assert read(tmp_path).provenance["step"] == 1
    (tmp_path / "model_000001.npy").unlink()
    with pytest.raises(PvdError) as caught:
        read(tmp_path)
    assert caught.value.exit_code == 4


def test_bmild_networks_of_two_sizes(tmp_path: Path) -> None:
    save_keras(tmp_path / "model_000001.npy", keras(4, 16, 9))
    save_keras(tmp_path / "model_fine_000001.npy", keras(8, 32))
    parts = read(tmp_path)
    assert parts.config["coarse"] == {"depth": 4, "width": 16, "skips": [], "direction_layers": [8]}
    ask(parts, *points(3))  # the architecture takes it


@pytest.mark.parametrize(
    ("text", "background", "near", "assumed"),
    [
        ("dataset_type = blender\nwhite_bkgd = True\n", (1.0, 1.0, 1.0), 2.0, ("box",)),
        ("dataset_type = blender\nwhite_bkgd = False\n", (0.0, 0.0, 0.0), 2.0, ("box",)),
        ("dataset_type = llff\nno_ndc = False\n", (0.0, 0.0, 0.0), 0.0, ("box", "ray_space")),
        (None, (1.0, 1.0, 1.0), 2.0, ("box", "background", "near", "far")),
    ],
)
def test_bmild_scene(tmp_path: Path, text: str | None, background: Any, near: float, assumed: tuple[str, ...]) -> None:
    save_keras(tmp_path / "model_000001.npy", keras())
    if text is not None:
        (tmp_path / "args.txt").write_text(text)
    scene = read(tmp_path).scene
    assert (scene.background, scene.near, scene.assumed) == (background, near, assumed)
    given = ReadOptions(
        Box.cube(1.0), (0.0, 0.0, 1.0), 1.0, 5.0, extra={"width": "504", "height": "378", "focal": "407.5"}
    )
    scene = read(tmp_path, given).scene
    assert (scene.box, scene.background, scene.near, scene.far) == (Box.cube(1.0), (0.0, 0.0, 1.0), 1.0, 5.0)
    assert scene.assumed == ()
    if text and "llff" in text:
        assert (scene.ray_space.kind, scene.ray_space.focal, scene.ray_space.near) == ("ndc", 407.5, 1.0)


def test_bmild_asks_for_what_no_file_says(tmp_path: Path) -> None:
    save_keras(tmp_path / "model_000001.npy", keras())
    (tmp_path / "args.txt").write_text("dataset_type = deepvoxels\n")
    with pytest.raises(InputError, match=r"--bounds.*--near and --far"):
        read(tmp_path)
    assert read(tmp_path, ReadOptions(Box.cube(1.0), None, 1.0, 2.0)).scene.far == 2.0


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w[:-1],
        lambda w: w[:-2],
        lambda w: [w[0], w[1][:-1], *w[2:]],
        lambda w: [w[0][:-1], *w[1:]],
        lambda w: [*w[:10], w[10][:-1], *w[11:]],
        lambda w: [np.array([200000.0], np.float32), *w],
        lambda w: [a.astype(np.int64) for a in w],
        lambda w: [*w[:-2], np.zeros((32, 2), np.float32), np.zeros(2, np.float32)],
    ],
)
def test_bmild_wrong_shapes(tmp_path: Path, change: Any) -> None:
    path = save_keras(tmp_path / "model_000001.npy", change(keras()))
    with pytest.raises(PvdError) as caught:
        read(path)
    assert caught.value.exit_code == 4
    with pytest.raises(InputError, match=r"model_000001\.npy: bmild") as forced:
        default().format("bmild").read(open_manifest(path), ReadOptions())
    assert "\n" not in str(forced.value)


# ------------------------------------------------------------------------------------------------- krrish94


class FlexibleNeRF(nn.Module):
    """krrish94's network as its code states it: no ReLU after layer1, skips [h, x], ReLU after fc_feat."""

    def __init__(self, layers: int, hidden: int, every: int, octaves: int, views: bool = True) -> None:
        super().__init__()
        wide = 3 + 6 * octaves
        self.octaves, self.views = octaves, views
        self.skips = [i for i in range(layers - 1) if i % every == 0 and i > 0]
        self.layer1 = nn.Linear(wide, hidden)
        self.layers_xyz = nn.ModuleList(nn.Linear(hidden + wide * (i in self.skips), hidden) for i in range(layers - 1))
        if views:
            self.layers_dir = nn.ModuleList([nn.Linear(hidden + 27, hidden // 2)])
            self.fc_alpha, self.fc_feat = nn.Linear(hidden, 1), nn.Linear(hidden, hidden)
            self.fc_rgb = nn.Linear(hidden // 2, 3)
        else:
            self.fc_out = nn.Linear(hidden, 4)

    def forward(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        e = fourier(x, self.octaves)
        h = self.layer1(e)
        for i, layer in enumerate(self.layers_xyz):
            h = torch.relu(layer(torch.cat([h, e], -1) if i in self.skips else h))
        if not self.views:
            out = self.fc_out(h)
            return torch.relu(out[:, 3]), torch.sigmoid(out[:, :3])
        y = torch.cat([torch.relu(self.fc_feat(h)), fourier(d, 4)], -1)
        rgb = torch.sigmoid(self.fc_rgb(torch.relu(self.layers_dir[0](y))))
        return torch.relu(self.fc_alpha(h))[:, 0], rgb


def save_krrish94(path: Path, fine: nn.Module | None, coarse: nn.Module, **changes: Any) -> Path:
    value = {"iter": 99, "model_coarse_state_dict": coarse.state_dict(), "loss": torch.tensor(0.5), "psnr": 20.0}
    if fine is not None:
        value["model_fine_state_dict"] = fine.state_dict()
    value.update(changes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


@pytest.mark.parametrize(("layers", "every", "views"), [(4, 4, True), (8, 4, True), (8, 3, True), (4, 4, False)])
def test_krrish94_is_the_function_of_its_program(tmp_path: Path, layers: int, every: int, views: bool) -> None:
    torch.manual_seed(layers)
    fine, coarse = (FlexibleNeRF(layers, 32, every, 6, views) for _ in range(2))
    parts = read(save_krrish94(tmp_path / "a.ckpt", fine, coarse))
    x, d = points()
    sigma, rgb = ask(parts, x, d)
    with torch.no_grad():
        expected = fine(x, d)
    torch.testing.assert_close(sigma, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rgb, expected[1], rtol=1e-4, atol=1e-5)
    assert parts.config["has_coarse"]
    assert parts.provenance["step"] == 99
    assert parts.config["skips"] == fine.skips


def test_krrish94_settings(tmp_path: Path) -> None:
    net = FlexibleNeRF(4, 32, 4, 10)
    path = save_krrish94(tmp_path / "a.ckpt", None, net)
    assert any("only one network" in n for n in read(path).notes)
    (tmp_path / "config.yml").write_text(
        "dataset: {type: blender, near: 1, far: 7}\nmodels: {fine: {hidden_size: 256, num_layers: 4}}\n"
        "nerf: {validation: {white_background: false}}\n"
    )
    parts = read(path)
    assert any("hidden_size 256 is 32" in n and "shapes win" in n for n in parts.notes)
    assert (parts.scene.near, parts.scene.far, parts.scene.background) == (1.0, 7.0, (0.0, 0.0, 0.0))
    assert parts.scene.assumed == ("box",)
    (tmp_path / "config.yml").write_text("dataset: {type: llff, no_ndc: true}")
    with pytest.raises(InputError, match="--bounds"):
        read(path)
    (tmp_path / "config.yml").write_text("models: {fine: {log_sampling_xyz: false}}")
    with pytest.raises(InputError, match="log_sampling_xyz"):
        read(path)
    other = tmp_path / "other.yml"
    other.write_text("dataset: {type: llff, no_ndc: false}")
    assert read(path, ReadOptions(config=other)).scene.ray_space.kind == "ndc"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "- 1\n- 2",
        "!!python/object/apply:os.system [touch marker]",
        "[" * 20_000,
        "a: \x00",
        "x: " + "a" * (1 << 19),
    ],
)
def test_krrish94_hostile_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = save_krrish94(tmp_path / "a.ckpt", None, FlexibleNeRF(4, 32, 4, 10))
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yml"):
        read(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("fc_feat.weight", None, "fc_feat.weight.*missing"),
        ("fc_rgb.weight", torch.zeros(4, 16), r"fc_rgb\.weight.*\[3, 16\]"),
        ("layer1.weight", torch.zeros(32, 40), "no frequency encoding"),
        ("layers_xyz.1.weight", torch.zeros(32, 33), r"layers_xyz\.1\.weight"),
        ("layers_xyz.1.weight", None, "not consecutive"),
        ("layer1.bias", torch.zeros(31), r"layer1\.bias"),
        ("extra.weight", torch.zeros(2), "extra.weight.*no place"),
        ("layers_dir.0.weight", torch.zeros(16, 62), "one of the two encodings"),
        ("fc_alpha.weight", torch.zeros(1, 32, dtype=torch.int64), "int64"),
    ],
)
def test_krrish94_wrong_shapes(tmp_path: Path, key: str, value: Tensor | None, match: str) -> None:
    state = dict(FlexibleNeRF(4, 32, 4, 10).state_dict())
    if value is None:
        del state[key]
    else:
        state[key] = value
    path = save_krrish94(tmp_path / "a.ckpt", None, nn.Module(), model_coarse_state_dict=state)
    with pytest.raises(InputError, match=match) as caught:
        read(path)
    assert "a.ckpt: krrish94: model_coarse_state_dict" in str(caught.value)


# ------------------------------------------------------------------------------------------------- jiayi


def test_jiayi_is_the_function_of_its_program(tmp_path: Path) -> None:
    """Encodings by coordinate, float64, directions as long as the camera makes them."""

    def by_coordinate(v: Tensor, octaves: int) -> Tensor:
        columns = [v[:, :, None], *[f(2.0**k * v)[:, :, None] for k in range(octaves) for f in (torch.sin, torch.cos)]]
        return torch.cat(columns, 2).flatten(1)

    torch.manual_seed(0)
    sizes = {"fc_1.0": (63, 32), "fc_2.0": (32, 32), "fc_3.0": (95, 32), "fc_noact": (32, 32), "fc_dir.0": (59, 16),
             "sigma": (32, 1), "rgb.0": (16, 3)}  # fmt: skip
    net = {k: nn.Linear(*s).double() for k, s in sizes.items()}
    state = {f"{k}.{p}": v for k, layer in net.items() for p, v in layer.state_dict().items()}
    torch.save({"epoch": 5, "model_state_dict": state, "psnrs": [1.0]}, tmp_path / "a.pt")
    parts = read(tmp_path / "a.pt", ReadOptions(extra={"direction_length": "1.25"}))
    x, d = points()
    e = by_coordinate(x.double(), 10)
    with torch.no_grad():
        h = torch.relu(net["fc_2.0"](torch.relu(net["fc_1.0"](e))))
        h = torch.relu(net["fc_3.0"](torch.cat([e, h], 1)))
        y = torch.cat([net["fc_noact"](h), by_coordinate(1.25 * d.double(), 4)], 1)
        rgb = torch.sigmoid(net["rgb.0"](torch.relu(net["fc_dir.0"](y))))
        depth_density = torch.relu(net["sigma"](h))[:, 0]
    got = ask(parts, x, d)
    torch.testing.assert_close(got[0].double() * 1.25, depth_density, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1].double(), rgb, rtol=1e-4, atol=1e-5)
    assert any("float64" in n for n in parts.notes)
    assert any("mean length" in n for n in read(tmp_path / "a.pt").notes)
    del state["fc_2.0.weight"]
    torch.save(state, tmp_path / "bare.pt")
    with pytest.raises(InputError, match="not consecutive"):
        read(tmp_path / "bare.pt")


# ------------------------------------------------------------------------------------------------- real files


def test_real_files(data_root: Path) -> None:
    root = data_root / "checkpoints"
    lego, fern = read(root / "krrish94-lego"), read(root / "krrish94-fern")
    assert (lego.config["width"], lego.config["depth"], lego.config["position_frequencies"]) == (128, 4, 10)
    assert any("hidden_size 256 is 128" in n and "num_layers 8 is 4" in n for n in lego.notes)
    assert (fern.config["position_frequencies"], fern.scene.ray_space.kind, fern.scene.far) == (6, "ndc", 1.0)
    jiayi = read(root / "jiayi-lego100")
    assert (jiayi.config["skips"], jiayi.config["encoding_order"], jiayi.scene.background) == (
        [1],
        "per-coordinate",
        (0, 0, 0),
    )
    bmild = read(root / "bmild-lego")
    assert (bmild.config["depth"], bmild.config["width"], bmild.config["skips"]) == (8, 256, [4])
    assert bmild.scene.assumed == ("box",)
    for parts in (lego, fern, jiayi, bmild):
        sigma, rgb = ask(parts, *points(8))
        assert torch.isfinite(sigma).all()
        assert ((rgb >= 0) & (rgb <= 1)).all()
