"""The architecture ``hybrid``: what is joined and how, plans, files, refusals, and conversions of a small scene."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvdconvert.cli.settings import parse
from pvdconvert.errors import InputError, RequestError
from pvdconvert.nn.sh import sh_basis
from pvdconvert.pipeline import convert, open_field
from pvdconvert.plugin import Budget, Limits
from pvdconvert.render.occupancy import Occupancy
from pvdconvert.scene import Box, Scene
from pvdconvert.testing import AnalyticScene
from pvdconvert_plugins.hybrid import Hybrid
from pvdconvert_plugins.hybrid_field import HybridField
from pvdconvert_plugins.hybrid_spec import HybridOptions, checked, joined_width, widths

P = Hybrid()
SCENE = Scene(Box((-1.0, -1.0, -1.0), (1.0, 0.5, 1.0)))
SMALL: dict[str, Any] = {
    "hash_levels": 4, "hash_features": 3, "hash_log2_table": 8, "hash_base": 4, "hash_finest": 32, "vm_resolution": 9,
    "vm_rank": 4, "cp_resolution": 9, "cp_rank": 12, "planes_resolution": 9, "planes_channels": 12,
    "voxels_resolution": 9, "voxels_channels": 12, "frequencies": 2, "frequency_input": False, "mlp_width": 16,
}  # fmt: skip
"""Every encoding is 12 wide."""
EVERY = "hash+vm+cp+planes+voxels+frequency"


def anywhere(n: int, reach: float = 1.0, seed: int = 8) -> Tensor:
    return (torch.rand(n, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * reach


def directions(n: int, k: int = 1, seed: int = 9) -> Tensor:
    d = torch.randn(n, k, 3, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(d, dim=-1)


def field(encoders: str, seed: int = 3, **options: Any) -> HybridField:
    """A small field, every parameter stirred."""
    f = P.build({**SMALL, "encoders": encoders, **options}, SCENE, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in f.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return f


# ------------------------------------------------- encodings and joins, written down once more in numpy and in float64


def along(u: NDArray[Any], n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lower vertex and fraction of ``u`` in [0, 1] on n vertices."""
    low = np.minimum((u * (n - 1)).astype(int), n - 2)
    return low, (u * (n - 1) - low)[:, None]


def line(values: NDArray[Any], u: NDArray[Any]) -> NDArray[Any]:
    i, f = along(u, len(values))
    return np.asarray((1 - f) * values[i] + f * values[i + 1])


def plane(values: NDArray[Any], u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """[H, W, C] at u along W, v along H."""
    i, f = along(u, values.shape[1])
    j, g = along(v, values.shape[0])
    rows = [(1 - f) * values[j + s, i] + f * values[j + s, i + 1] for s in (0, 1)]
    return np.asarray((1 - g) * rows[0] + g * rows[1])


def hashed(table: NDArray[Any], p: NDArray[Any], o: HybridOptions) -> NDArray[Any]:
    """torch-ngp's grid: dense where (resolution + 1)^3 corners fit, else the hash; x * scale + 0.5."""
    growth = 2 ** (math.log2(o.hash_finest / o.hash_base) / (o.hash_levels - 1))
    first, out = 0, []
    for level in range(o.hash_levels):
        entries = min((math.ceil(o.hash_base * growth**level) + 1) ** 3, 2**o.hash_log2_table)
        entries = (entries + 7) // 8 * 8
        scale = o.hash_base * growth**level - 1
        stride = math.ceil(round(scale, 4)) + 2
        at = p * scale + 0.5
        corner = np.floor(at).astype(np.int64)
        f, total = at - corner, np.zeros((len(p), o.hash_features))
        for bits in np.ndindex(2, 2, 2):
            x, y, z = (corner + np.array(bits)).T
            if stride**3 > entries:
                index = ((x ^ (y * 2654435761) ^ (z * 805459861)) & 0xFFFFFFFF) % entries
            else:
                index = (x + y * stride + z * stride**2) % entries
            weight = np.where(np.array(bits) == 1, f, 1 - f).prod(1)
            total += weight[:, None] * table[first + index]
        out.append(total)
        first += entries
    assert first == len(table)
    return np.concatenate(out, axis=1)


def encodings(f: HybridField, p: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Every encoding at ``p`` [N, 3] in the unit cube, from the saved tensors and the encoders' formulas."""
    o, pairs, axes = f.options, ((0, 1), (0, 2), (1, 2)), (2, 1, 0)
    t = {name: tensor.double().numpy() for name, tensor in P.save(f)[1].items()}
    read = [plane(t[f"planes.planes.{i}"], p[:, a], p[:, b]) for i, (a, b) in enumerate(pairs)]
    modes = [
        plane(t[f"vm.planes.{i}"], p[:, a], p[:, b]) * line(t[f"vm.lines.{i}"], p[:, c])
        for i, ((a, b), c) in enumerate(zip(pairs, axes))
    ]
    shape = t["voxels.vertices"].astype(int).max(0) + 1
    dense = np.zeros((*shape, o.voxels_channels))
    dense[tuple(t["voxels.vertices"].astype(int).T)] = t["voxels.features"]
    voxels = np.zeros((len(p), o.voxels_channels))
    cells = [along(p[:, k], shape[k]) for k in range(3)]
    for bits in np.ndindex(2, 2, 2):
        weight = np.prod([g if bit else 1 - g for (_, g), bit in zip(cells, bits)], axis=0)
        voxels += weight * dense[tuple(i + bit for (i, _), bit in zip(cells, bits))]
    phase = 2 * p - 1
    waves = [wave(2.0**k * phase) for k in range(o.frequencies) for wave in (np.sin, np.cos)]
    return {
        "hash": hashed(t["hash.embeddings"], p, o),
        "vm": np.concatenate(modes, axis=1),
        "cp": np.prod([line(t[f"cp.lines.{i}"], p[:, c]) for i, c in enumerate(axes)], axis=0),
        "planes": np.asarray(read[0] * read[1] * read[2]),
        "voxels": voxels,
        "frequency": np.concatenate(waves, axis=1),
    }


@pytest.mark.parametrize("join", ["concat", "sum", "product"])
def test_the_joined_encoding_is_the_join_of_the_encoders(join: str) -> None:
    """float64, all six encoders at once, each against its formula, then their concatenation, sum and product."""
    f = field(EVERY, join=join)
    x = anywhere(300).double() * torch.tensor([0.99, 0.74, 0.99]) - torch.tensor([0.0, 0.25, 0.0])
    p = ((x - torch.tensor([-1.0, -1.0, -1.0])) / torch.tensor([2.0, 1.5, 2.0])).numpy()
    expected = encodings(f, p)
    f = f.double()
    with torch.no_grad():
        for name, encoder in f.encoders.items():
            # The grids' scales are float32, as in every program that has them.
            atol = 1e-5 if name == "hash" else 1e-12
            np.testing.assert_allclose(encoder(torch.from_numpy(p)), expected[name], atol=atol, err_msg=name)
            expected[name] = encoder(torch.from_numpy(p)).numpy()
        got = f.features(f.encode(x))
    parts = [expected[name] for name in EVERY.split("+")]
    joined = {"concat": np.concatenate(parts, axis=1), "sum": np.sum(parts, axis=0), "product": np.prod(parts, axis=0)}
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got, joined[join], rtol=1e-11, atol=1e-14)
    assert f.feature_width == got.shape[1] == (72 if join == "concat" else 12)


@pytest.mark.parametrize("planes_join", ["concat", "sum"])
def test_planes_are_concatenated_or_added(planes_join: str) -> None:
    f = field("planes", planes_join=planes_join)
    p = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)).double().numpy()
    t = P.save(f)[1]
    read = [plane(t[f"planes.planes.{i}"].double().numpy(), p[:, a], p[:, b]) for i, (a, b) in enumerate(((0, 1), (0, 2), (1, 2)))]  # fmt: skip # noqa: E501
    expected = np.concatenate(read, axis=1) if planes_join == "concat" else np.sum(read, axis=0)
    got = f.double().joined(torch.from_numpy(p))
    np.testing.assert_allclose(got.detach(), expected, atol=1e-12)
    assert joined_width(f.options) == (36 if planes_join == "concat" else 12)


@pytest.mark.parametrize("activation", ["exp", "softplus", "relu"])
def test_the_sh_decoder_is_linear(activation: str) -> None:
    """density = scale * act(w0 e + b0 + shift); colour = sigmoid(sum_b SH_b(d) (w e + b)[c, b])."""
    f = field(
        "planes+voxels", decoder="sh", sh_bands=2, density_activation=activation, density_shift=0.25, density_scale=3.0
    )
    x, d = anywhere(64, 0.45), directions(64, 3)
    latent = f.encode(x)
    t = P.save(f)[1]
    out = f.features(latent) @ t["sh_net.0.weight"].T + t["sh_net.0.bias"]
    raw = out[:, 0] + 0.25
    act = {"exp": raw.exp(), "softplus": raw.exp().log1p(), "relu": raw.clamp_min(0)}[activation]
    torch.testing.assert_close(f.density(latent), 3.0 * act, rtol=1e-4, atol=1e-5)
    rgb = torch.einsum("nkb,ncb->nkc", sh_basis(d, 2), out[:, 1:].view(-1, 3, 4)).sigmoid()
    torch.testing.assert_close(f.color(latent, d), rgb, rtol=1e-4, atol=1e-5)


def test_without_encoders_the_mlp_sees_the_position() -> None:
    f = field("none")
    x = torch.tensor([[1.0, 0.5, -1.0], [0.0, -0.25, 0.0]])
    torch.testing.assert_close(f.features(f.encode(x)), torch.tensor([[1.0, 1.0, -1.0], [0.0, 0.0, 0.0]]))


# ---------------------------------------------------------------------------------------------------- memory and files


def corner(cells: int = 16) -> Occupancy:
    """An eighth of the cube, less its outer cells."""
    grid = torch.zeros((cells,) * 3, dtype=torch.uint8)
    grid[2 : cells // 2, 2 : cells // 2, 2 : cells // 2] = 1
    return Occupancy(torch.full((3,), -1.0), 2 / cells, grid)


def test_voxels_exist_only_where_the_mask_is_set() -> None:
    f = P.build({**SMALL, "encoders": "voxels+hash", "voxels_resolution": 129}, SCENE, 0)
    assert f.voxels is not None
    assert len(f.voxels.features) == 0  # too many to start with
    assert not bool(f.density(f.encode(anywhere(50, 0.4))).any())
    f.restrict(corner())
    assert 45**3 < len(f.voxels.features) < 51**3  # 6 cells of 8 voxels a side
    x = anywhere(4000, 1.0)
    held, sigma = corner().contains(x), f.density(f.encode(x))
    assert bool((sigma[held] > 0).all())
    assert bool((sigma[~held] == 0).all())


@pytest.mark.parametrize("options", [{"encoders": EVERY}, {"encoders": "voxels*frequency", "decoder": "sh"}])
def test_round_trip_is_exact(options: dict[str, Any]) -> None:
    f = field(**options)
    f.restrict(corner())
    config, tensors = P.save(f)
    back = P.load(json.loads(json.dumps(config)), {k: t.clone() for k, t in tensors.items()}, SCENE)
    again, same = P.save(back)
    assert again == config
    assert same.keys() == tensors.keys()
    assert all(torch.equal(t, same[k]) for k, t in tensors.items())
    x, d = anywhere(500), directions(500, 2)
    latent, other = f.encode(x), back.encode(x)
    assert torch.equal(f.density(latent), back.density(other))
    assert torch.equal(f.color(latent, d), back.color(other, d))


def test_builds_follow_the_seed() -> None:
    a, b, c = (dict(P.build({**SMALL, "encoders": EVERY}, SCENE, s).named_parameters()) for s in (1, 1, 2))
    assert all(torch.equal(p, b[k]) for k, p in a.items())
    assert [k for k, p in a.items() if torch.equal(p, c[k]) and "bias" not in k] == []


def test_bad_tensors_are_refused_by_name() -> None:
    config, tensors = P.save(field("voxels+vm"))
    vertices = tensors["voxels.vertices"]
    for change, words in (
        ({"vm.planes.1": tensors["vm.planes.1"][1:]}, r"'vm\.planes\.1' is .*expected float"),
        ({"voxels.features": tensors["voxels.features"][:, 1:]}, r"'voxels\.features' is torch.float32 \[567, 11\]"),
        ({"voxels.vertices": vertices.float()}, r"'voxels\.vertices' is torch.float32"),
        ({"voxels.vertices": vertices.flip(0)}, r"'voxels\.vertices': .*sorted"),
        ({"voxels.vertices": vertices + 1}, r"'voxels\.vertices': .*outside"),
        ({"sigma_net.0.weight": tensors["sigma_net.0.weight"].long()}, r"'sigma_net\.0\.weight' is torch.int64"),
        ({"cp.lines.0": torch.zeros(2)}, r"'cp\.lines\.0' is not part"),
    ):
        with pytest.raises(InputError, match=words):
            P.load(config, {**tensors, **change}, SCENE)
    huge = {**config, "vm_resolution": 4096, "vm_rank": 1024}  # refused before 200 GB are made
    with pytest.raises(InputError, match=r"'vm\.planes\.0' is .* expected float \[3072, 4096, 1024\]"):
        P.load(huge, tensors, SCENE)
    with pytest.raises(InputError, match=r"'vm\.lines\.2' is missing"):
        P.load(config, {k: t for k, t in tensors.items() if k != "vm.lines.2"}, SCENE)


# --------------------------------------------------------------------------------------------------- plans and refusals


def planned(*sets: str, max_mb: float | None = None, preset: str = "fast") -> HybridOptions:
    teacher = AnalyticScene()
    given = parse(sets, HybridOptions, "hybrid")
    config = P.plan(teacher.facts(), Budget(preset, max_mb=max_mb), Limits(), given)
    return checked(json.loads(json.dumps(config)), InputError)


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["encoders=hahs+vm"], "unknown encoder 'hahs'.*did you mean 'hash'"),
        (["encoders=vm+cp+vm"], "'vm' is listed twice"),
        (["encoders=hash*vm+cp"], "mixes joins"),
        (["encoders=hash*vm", "join=sum"], "mixes joins"),
        (["encoders=vm+cp", "join=sum", "vm_rank=5", "cp_rank=16"], "one width, not vm 15, cp 16.*vm_rank, cp_rank"),
        (["encoders=hash+vm", "join=mean"], "join='mean' is not supported.*concat, sum, product"),
        (["encoders=none", "decoder=sh"], "decoder=sh needs an encoder"),
        (["encoders=frequency", "frequencies=0", "frequency_input=no"], "'frequency' is empty"),
        (["decoder=tree"], "decoder='tree' is not supported.*mlp, sh"),
        (["vm_rank=0"], "vm_rank=0 is not a whole number in 1"),
        (["density_scale=-1"], "density_scale=-1.0 .*impossible"),
        (["encoders=hash", "hash_base=4000", "hash_finest=1", "hash_levels=2"], "hash_finest=1 is not a whole number"),
    ],
)
def test_bad_compositions_are_refused_in_one_line(sets: list[str], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        planned(*sets)
    assert "\n" not in str(caught.value)


def test_a_misspelt_key_is_named() -> None:
    with pytest.raises(RequestError, match=r"'vm_rnak'.*did you mean 'vm_rank'"):
        P.plan(AnalyticScene().facts(), Budget("fast"), Limits(), {"vm_rnak": 4})


@pytest.mark.parametrize(
    ("sets", "width"),
    [
        (["encoders=hash+vm"], 32 + 48),
        (["encoders=hash*vm*cp*planes*voxels*frequency"], 48),
        (["encoders=vm+frequency", "join=sum", "frequencies=10"], 63),
        (["encoders=hash+voxels", "join=product", "voxels_channels=20"], 20),
    ],
)
def test_plans_make_widths_fit(sets: list[str], width: int) -> None:
    o = planned(*sets)
    assert joined_width(o) == width
    assert o.join == "concat" or set(widths(o).values()) == {width}


@pytest.mark.parametrize("encoders", ["hash", "vm+cp", "planes+voxels", EVERY])
def test_plans_keep_the_size(encoders: str) -> None:
    """The file's tensors stay below --max-mb and use more than a third of it, also at another preset."""
    teacher = AnalyticScene()
    for preset in ("fast", "best"):
        o = planned(f"encoders={encoders}", max_mb=1.5, preset=preset)
        f = P.build({**P.plan(teacher.facts(), Budget(preset, max_mb=1.5), Limits(), {"encoders": encoders})}, teacher.scene, 0)  # fmt: skip # noqa: E501
        f.restrict(teacher.occupancy())
        size = sum(t.numel() * t.element_size() for t in P.save(f)[1].values()) / 1e6
        assert o.encoders == encoders
        assert 0.5 < size <= 1.5
    with pytest.raises(RequestError, match=r"does not fit into 0\.001 MB: the least"):
        planned(f"encoders={encoders}", max_mb=0.001)


def test_rates_are_those_of_the_single_architectures() -> None:
    groups = {g["name"]: g for g in P.param_groups(field(EVERY))}
    assert {name: g["lr"] for name, g in groups.items()} == {
        "table": 1e-2, "vm": 2e-2, "cp": 2e-2, "planes": 2e-2, "voxels": 2e-2, "networks": 2e-2
    }  # fmt: skip
    assert groups["voxels"]["sparse_rows"]
    deep = P.param_groups(field("frequency", mlp_width=128, mlp_layers=4))
    assert [(g["name"], g["lr"]) for g in deep] == [("networks", 5e-3)]
    assert "frequency" not in groups


def test_what_cannot_be_held_is_refused() -> None:
    with pytest.raises(RequestError, match="output layout needs vm_rank=4"):
        P.plan(AnalyticScene().facts(), Budget("fast"), Limits(fixed={"vm_rank": 4}), {"vm_rank": 5})


# ---------------------------------------------------------------------------------------------------------- conversions


@pytest.mark.parametrize(
    "sets",
    [
        {"encoders": "hash"},
        {"encoders": "hash+vm"},
        {"encoders": "vm*frequency"},
        {"encoders": "planes+voxels", "decoder": "sh", "voxels_resolution": 40},
    ],
    ids=lambda sets: str(sets["encoders"]).replace("*", "-times-"),
)
def test_a_small_scene_converts(sets: dict[str, Any], tmp_path: Path) -> None:
    """Thirty steps a stage bring every composition above 20 dB (an empty picture has about 10, these 27 to 34)."""
    teacher, out = AnalyticScene(), tmp_path / "student.safetensors"
    report = convert(
        teacher, "hybrid", out=out, preset="fast", max_mb=4.0, sets=sets, steps="labels=1;density=30;color=30",
        scene=teacher.scene, device="cpu", validate=False,
    ).to_json()  # fmt: skip
    loaded = open_field(out)
    assert isinstance(loaded.field, HybridField)
    assert loaded.field.options.names == tuple(sets["encoders"].replace("*", "+").split("+"))
    scores = [stage["psnr_after"] for stage in report["stages"] if stage["psnr_after"] is not None]
    assert scores[-1] > 20.0
