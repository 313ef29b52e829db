"""yenchenlin/nerf-pytorch: a file of its own code with its answers; and files made by hand in its key tree."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.identify import identify
from pvdconvert.loading import Loaded, open_field
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Box
from pvdconvert_formats.nerf_pytorch import probe
from tests.peers import check_points, check_views, oracle


def read(path: Path, options: ReadOptions | None = None) -> Parts:
    found = identify(path)
    assert found.format == "nerf-pytorch"
    return default().format(found.format).read(found.manifest, options or ReadOptions())


def build(parts: Parts) -> Any:
    tensors = {k: torch.from_numpy(t.numpy().copy()) for k, t in parts.tensors.items()}
    return default().architecture("nerf").load(dict(parts.config), tensors, parts.scene)


# ------------------------------------------------------------------------------------------------- the peer's own file


@pytest.fixture(scope="module")
def peer(data_root: Path) -> tuple[Loaded, dict[str, Any]]:
    folder = data_root / "checkpoints" / "peers" / "nerf-pytorch"
    return open_field(folder / "200000.tar"), oracle(folder / "oracle_lego.npz")


def coarse_as_field(loaded: Loaded) -> Loaded:
    """The same file with its coarse network as the field."""
    parts = loaded.parts
    config = {**parts.config, **(parts.config["coarse"] or {}), "has_coarse": False, "coarse": None}
    own = {k.replace("coarse.", "fine."): t for k, t in parts.tensors.items() if k.startswith("coarse.")}
    return dataclasses.replace(loaded, field=build(dataclasses.replace(parts, config=config, tensors=own)).eval())


def test_the_peers_own_answers(peer: tuple[Loaded, dict[str, Any]]) -> None:
    loaded, truth = peer
    check_points(loaded, truth)
    check_points(coarse_as_field(loaded), {**truth, "sigma": truth["sigma_coarse"], "rgb": truth["rgb_coarse"]})


def test_what_the_peers_file_says(peer: tuple[Loaded, dict[str, Any]]) -> None:
    loaded, truth = peer
    scene = loaded.scene
    assert (scene.near, scene.far) == tuple(truth["near_far"])
    assert scene.background == (1.0, 1.0, 1.0)
    assert scene.assumed == ("box",)
    assert loaded.parts.provenance["step"] == 199999
    assert any("optimizer_state_dict" in note for note in loaded.notes)
    assert not any("shapes win" in note for note in loaded.notes)


@pytest.mark.slow
def test_the_peers_own_pictures(peer: tuple[Loaded, dict[str, Any]]) -> None:
    """Its own rays (through the corners of pixels), and those of a K matrix whose centre is 49.625 (50 - 0.375)."""
    loaded, truth = peer
    check_views(loaded, truth)
    centred = {**truth, **{f"view{k}_psnr": truth[f"viewK{k}_psnr"] for k in (0, 1)}}
    assert truth["K_offset_views"][0, 2] == 49.625
    check_views(loaded, centred, offset=0.375)


# ---------------------------------------------------------------------------------------------------------- by hand


def embed(v: Tensor, octaves: int) -> Tensor:
    """FE-A of layouts section 0.5: [v, sin v, cos v, sin 2v, cos 2v, ...]; with 0 octaves the identity (i_embed -1)."""
    return torch.cat([v, *[f(2.0**k * v) for k in range(octaves) for f in (torch.sin, torch.cos)]], -1)


class Net(nn.Module):
    """The network of layouts section 5.1 in the program's key tree; :meth:`forward` in float64."""

    def __init__(
        self, depth: int, width: int, skip: int, octaves: tuple[int, int], views: int | None, outputs: int = 5
    ) -> None:
        super().__init__()
        self.skip, self.octaves, self.views = skip, octaves, views
        wide, view_wide = (3 + 6 * k for k in octaves)
        self.pts_linears = nn.ModuleList(
            nn.Linear(wide if i == 0 else width + wide * (i - 1 == skip), width) for i in range(depth)
        )
        half = width // 2
        sizes = [(width + (view_wide if views else 0), half)] + [(half, half)] * ((views or 1) - 1)
        self.views_linears = nn.ModuleList(nn.Linear(*s) for s in sizes)
        if views:
            self.feature_linear, self.alpha_linear = nn.Linear(width, width), nn.Linear(width, 1)
            self.rgb_linear = nn.Linear(half, 3)
        else:
            self.output_linear = nn.Linear(width, outputs)
        for name, p in self.named_parameters():
            nn.init.normal_(p, std=0.1 if name.endswith("bias") else (2 / p.shape[1]) ** 0.5)

    def forward(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            e = embed(x.double(), self.octaves[0])
            net = self.double()
            h = e
            for i, layer in enumerate(net.pts_linears):
                h = torch.relu(layer(torch.cat([e, h], -1) if i - 1 == self.skip else h))
            if not self.views:
                out = net.output_linear(h)
                answer = torch.relu(out[:, 3]), torch.sigmoid(out[:, :3])
            else:
                y = torch.cat([net.feature_linear(h), embed(d.double(), self.octaves[1])], -1)
                for layer in net.views_linears:
                    y = torch.relu(layer(y))
                answer = torch.relu(net.alpha_linear(h))[:, 0], torch.sigmoid(net.rgb_linear(y))
            self.float()
        return answer


def save(path: Path, coarse: nn.Module, fine: nn.Module | None = None, **changes: Any) -> Path:
    value: dict[str, Any] = {
        "global_step": 4999,
        "network_fn_state_dict": coarse.state_dict(),
        "network_fine_state_dict": None if fine is None else fine.state_dict(),
        "optimizer_state_dict": torch.optim.Adam([nn.Parameter(torch.zeros(3))], lr=1e-3).state_dict(),
    }
    torch.save({k: v for k, v in {**value, **changes}.items() if v is not ...}, path)
    return path


def points(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    d = torch.randn(n, 3, generator=generator)
    return torch.rand(n, 3, generator=generator) * 1.6 - 0.8, d / d.norm(dim=1, keepdim=True)


CASES = {
    "as published": (8, 32, 4, (10, 4), 1),
    "shallow, no skip": (3, 24, 9, (6, 2), 1),
    "another skip": (5, 16, 1, (4, 1), 1),
    "no encoding (i_embed -1)": (4, 16, 9, (0, 0), 1),
    "two view layers": (4, 16, 9, (4, 2), 2),
    "no view directions": (8, 32, 4, (10, 4), None),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_function_of_its_program(tmp_path: Path, case: str) -> None:
    depth, width, skip, octaves, views = CASES[case]
    torch.manual_seed(depth)
    coarse, fine = (Net(depth, width, skip, octaves, views) for _ in range(2))
    parts = read(save(tmp_path / "renamed.bin", coarse, fine))
    x, d = points()
    with torch.no_grad():
        sigma, rgb = build(parts)(x, d)
    expected = fine(x, d)
    assert (expected[0] > 0).any()
    torch.testing.assert_close(sigma.double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rgb.double(), expected[1], rtol=1e-4, atol=1e-5)
    assert parts.config["has_coarse"]
    assert parts.config["skips"] == ([skip] if skip < depth - 1 else [])
    assert any("unused" in n for n in parts.notes) == (views is None)
    assert parts.provenance["step"] == 4999


def test_one_network_of_four_outputs(tmp_path: Path) -> None:
    """N_importance 0 writes no fine network, and output_linear has four rows."""
    net = Net(4, 16, 9, (4, 2), None, outputs=4)
    parts = read(save(tmp_path / "a.tar", net))
    x, d = points()
    with torch.no_grad():
        sigma, _ = build(parts)(x, d)
    torch.testing.assert_close(sigma.double(), net(x, d)[0], rtol=1e-4, atol=1e-5)
    assert not parts.config["has_coarse"]
    assert any("only one network" in n for n in parts.notes)


def test_networks_of_two_sizes_in_parallel_wrappers(tmp_path: Path) -> None:
    coarse, fine = Net(2, 16, 9, (4, 2), 1), Net(8, 32, 4, (4, 2), 1)
    parts = read(save(tmp_path / "a.tar", nn.DataParallel(coarse), nn.DataParallel(fine)))
    assert parts.config["coarse"] == {
        "depth": 2, "width": 16, "skips": [], "bottleneck_width": 16, "direction_layers": [8],
    }  # fmt: skip
    np.testing.assert_array_equal(parts.tensors["coarse.rgb.bias"].numpy(), coarse.rgb_linear.bias.detach().numpy())
    build(parts)


def test_a_legacy_stream_of_doubles(tmp_path: Path) -> None:
    net = Net(3, 16, 9, (4, 2), 1).double()
    value = {"global_step": 1, "network_fn_state_dict": net.state_dict(), "optimizer_state_dict": {}}
    torch.save(value, tmp_path / "a.tar", _use_new_zipfile_serialization=False)
    parts = read(tmp_path / "a.tar")
    assert {t.dtype for t in parts.tensors.values()} == {"float32"}


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("text", "background", "near", "kind", "assumed"),
    [
        ("dataset_type = blender\nwhite_bkgd = True\n", (1.0, 1.0, 1.0), 2.0, "world", ("box",)),
        ("dataset_type = blender\n# white_bkgd = True\n", (0.0, 0.0, 0.0), 2.0, "world", ("box",)),
        ("dataset_type = llff\nno_ndc = False\n", (0.0, 0.0, 0.0), 0.0, "ndc", ("box", "ray_space")),
        ("expname = fern\n", (0.0, 0.0, 0.0), 0.0, "ndc", ("box", "ray_space")),
        (None, (1.0, 1.0, 1.0), 2.0, "world", ("box", "background", "near", "far")),
    ],
)
def test_scene(
    tmp_path: Path, text: str | None, background: Any, near: float, kind: str, assumed: tuple[str, ...]
) -> None:
    path = save(tmp_path / "000500.tar", Net(3, 16, 9, (4, 2), 1))
    if text is not None:
        (tmp_path / "config.txt").write_text(text)
    scene = read(path).scene
    assert (scene.background, scene.near, scene.ray_space.kind, scene.assumed) == (background, near, kind, assumed)


def test_args_win_over_config_and_the_users_file_over_both(tmp_path: Path) -> None:
    path = save(tmp_path / "000500.tar", Net(3, 16, 9, (4, 2), 1))
    (tmp_path / "config.txt").write_text("dataset_type = llff\n")
    (tmp_path / "args.txt").write_text("dataset_type = blender\n")
    assert read(path).scene.ray_space.kind == "world"
    other = tmp_path / "other.txt"
    other.write_text("dataset_type = llff\n")
    extra = {"width": "504", "height": "378", "focal": "407.5"}
    ray_space = read(path, ReadOptions(config=other, extra=extra)).scene.ray_space
    assert (ray_space.kind, ray_space.width, ray_space.focal, ray_space.near) == ("ndc", 504.0, 407.5, 1.0)
    other.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"other\.txt.*text"):
        read(path, ReadOptions(config=other))
    other.write_text("#" * (1 << 19))
    with pytest.raises(InputError, match="not the settings"):
        read(path, ReadOptions(config=other))


def test_shapes_win_over_settings(tmp_path: Path) -> None:
    net = Net(3, 16, 9, (4, 2), 1)
    path = save(tmp_path / "000500.tar", net, Net(3, 16, 9, (4, 2), 1))
    text = "dataset_type = blender\nnetdepth_fine = 8\nnetwidth_fine = 16\nmultires = 10\nuse_viewdirs = False\n"
    (tmp_path / "args.txt").write_text(text)
    (note,) = (n for n in read(path).notes if "shapes win" in n)
    assert "netdepth_fine '8' is 3" in note
    assert "multires '10' is 4" in note
    assert "use_viewdirs" in note
    assert "netwidth" not in note


def test_what_no_file_says_is_asked_for(tmp_path: Path) -> None:
    path = save(tmp_path / "000500.tar", Net(3, 16, 9, (4, 2), 1))
    (tmp_path / "args.txt").write_text("dataset_type = llff\nno_ndc = True\n")
    with pytest.raises(InputError, match=r"000500\.tar: nerf-pytorch.*--bounds.*--near and --far"):
        read(path)
    assert read(path, ReadOptions(Box.cube(1.0), None, 1.0, 2.0)).scene.far == 2.0


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("feature_linear.weight", None, "feature_linear.weight.*missing"),
        ("views_linears.0.weight", None, "views_linears.0.weight.*missing"),
        ("rgb_linear.weight", torch.zeros(4, 8), r"rgb_linear\.weight.*\[3, 8\]"),
        ("pts_linears.0.weight", torch.zeros(16, 40), "no frequency encoding"),
        ("pts_linears.1.weight", torch.zeros(16, 17), r"pts_linears\.1\.weight"),
        ("pts_linears.1.weight", None, "not consecutive"),
        ("alpha_linear.bias", torch.zeros(2), r"alpha_linear\.bias"),
        ("time_linear.weight", torch.zeros(2), "time_linear.weight.*no place"),
    ],
)
def test_wrong_shapes(tmp_path: Path, key: str, value: Tensor | None, match: str) -> None:
    state = dict(Net(3, 16, 9, (4, 2), 1).state_dict())
    if value is None:
        del state[key]
    else:
        state[key] = value
    path = save(tmp_path / "a.tar", nn.Module(), network_fn_state_dict=state)
    with pytest.raises(InputError, match=match) as caught:
        default().format("nerf-pytorch").read(open_manifest(path), ReadOptions())
    assert "a.tar: nerf-pytorch: network_fn_state_dict" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_tensors_and_networks_are_refused(tmp_path: Path) -> None:
    net = Net(3, 16, 9, (4, 2), 1)
    path = save(tmp_path / "a.tar", net, embed_fn_state_dict={"table": torch.zeros(4)})
    with pytest.raises(InputError, match=r"embed_fn_state_dict\.table.*no place"):
        read(path)
    path = save(tmp_path / "b.tar", net, network_fn_state_dict=..., network_fine_state_dict=net.state_dict())
    with pytest.raises(InputError, match="'network_fn_state_dict' is missing"):
        default().format("nerf-pytorch").read(open_manifest(path), ReadOptions())
    path = save(tmp_path / "c.tar", net, Net(3, 16, 9, (4, 2), None))
    with pytest.raises(InputError, match="of different kinds"):
        read(path)
    path = save(tmp_path / "d.tar", nn.Linear(2, 2))
    match = probe(open_manifest(path))
    assert match is not None
    assert match.score < 0.3


def test_no_other_file_is_claimed(data_root: Path) -> None:
    claimed = []
    for path in sorted((data_root / "checkpoints").rglob("*")):
        if (
            path.is_file()
            and path.suffix in (".tar", ".pt", ".pth", ".th", ".ckpt", ".npz", ".npy")
            and (path.parent.name != "refuse")
        ):
            claimed += [path.name] if probe(open_manifest(path)) else []
    assert claimed == ["200000.tar"]
