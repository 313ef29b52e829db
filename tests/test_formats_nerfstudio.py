"""nerfstudio: the program's own nerfacto run with its oracle, and what config.yml alone decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pvdconvert.containers import open_manifest
from pvdconvert.errors import InputError
from pvdconvert.identify import identify
from pvdconvert.loading import Loaded, open_field
from pvdconvert.plugin import Parts, ReadOptions
from pvdconvert.scene import Box, RaySpace
from pvdconvert_formats.nerfstudio import Nerfstudio, probe
from tests.nerfstudio_files import config, linear, nerfacto_torch, saved
from tests.peers import check_points, check_views, oracle

FORMAT = Nerfstudio()


def read(path: Path, **options: Any) -> Parts:
    return FORMAT.read(open_manifest(path), ReadOptions(**options))


# ------------------------------------------------------------------------------------------------ the peer's own run


@pytest.fixture(scope="module")
def run(data_root: Path) -> tuple[Loaded, dict[str, NDArray[Any]]]:
    folder = data_root / "checkpoints" / "peers" / "nerfstudio" / "nerfacto"
    return open_field(folder), oracle(folder / "oracle_lego.npz")


@pytest.mark.requires_data
def test_the_peers_points(run: tuple[Loaded, dict[str, NDArray[Any]]]) -> None:
    loaded, truth = run
    assert (loaded.format, loaded.architecture) == ("nerfstudio", "ngp")
    assert loaded.parts.config["density_scale"] == 0.1
    check_points(loaded, truth)
    assert loaded.scene.box == Box.cube(1.5)
    assert loaded.scene.background == (1.0, 1.0, 1.0)
    assert (loaded.scene.near, loaded.scene.far) == (2.0, 6.0)
    assert loaded.scene.assumed == ()
    assert any("lpips" in note for note in loaded.notes)
    assert any("mean of 100 images" in note for note in loaded.notes)


@pytest.mark.requires_data
@pytest.mark.slow
def test_the_peers_views(run: tuple[Loaded, dict[str, NDArray[Any]]]) -> None:
    loaded, truth = run
    check_views(loaded, truth)


@pytest.mark.requires_data
def test_the_checkpoint_alone_asks_for_its_config(data_root: Path, tmp_path: Path) -> None:
    folder = data_root / "checkpoints" / "peers" / "nerfstudio" / "nerfacto"
    path = tmp_path / "step-000000349.ckpt"
    shutil.copy(folder / "nerfstudio_models" / path.name, path)
    with pytest.raises(InputError, match=r"average_init_density.*--config FILE") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    parts = read(path, config=folder / "config.yml")
    assert parts.config["density_scale"] == 0.1
    assert "world" in parts.scene.assumed


# --------------------------------------------------------------------------------------------------- what files say


def test_a_run_folder_opens_its_latest_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        saved(tmp_path, nerfacto_torch(seed=step), step=step)
    found = identify(tmp_path)
    assert found.format == "nerfstudio"
    assert FORMAT.read(found.manifest, ReadOptions()).provenance["step"] == 100
    inner = identify(tmp_path / "nerfstudio_models")
    assert FORMAT.read(inner.manifest, ReadOptions()).provenance["step"] == 100


def test_wrappers_of_distributed_training_are_stripped(tmp_path: Path) -> None:
    plain = read(saved(tmp_path, nerfacto_torch()))
    for prefix in ("_model.module.", "module._model."):
        path = saved(tmp_path, nerfacto_torch(), prefix=prefix)
        assert read(path).config == plain.config


@pytest.mark.parametrize(("said", "scale"), [(None, 1.0), (0.01, 0.01), (1, 1.0)])
def test_density_has_the_unit_of_the_config(tmp_path: Path, said: float | None, scale: float) -> None:
    """Runs of before 2024 have no average_init_density: it was 1 then (layouts 7.1)."""
    path = saved(tmp_path, nerfacto_torch(), model={"average_init_density": said})
    assert read(path).config["density_scale"] == scale


def test_a_contracted_scene_is_all_of_space_or_cropped_where_nothing_moves(tmp_path: Path) -> None:
    path = saved(tmp_path, nerfacto_torch(), model={"disable_scene_contraction": False})
    with pytest.raises(InputError, match=r"contracted.*--bounds=-1,-1,-1,1,1,1"):
        read(path, bounds=Box.cube(1.5))
    whole = read(path)
    assert whole.config["box"] == [[-2.0] * 3, [2.0] * 3]  # u = (contracted + 2) / 4 (layouts 7.1)
    assert whole.scene.box == Box.cube(2.0)
    assert whole.scene.ray_space == RaySpace("contracted", norm="linf")
    parts = read(path, bounds=Box.cube(1.0))
    assert parts.config["box"] == [[-2.0] * 3, [2.0] * 3]  # u = (p + 2) / 4 where |p| < 1 (layouts 7.1)
    assert parts.scene.box == Box.cube(1.0)
    assert parts.scene.ray_space.kind == "world"
    assert any("cropped" in note for note in parts.notes)


@pytest.mark.parametrize(
    ("said", "background"),
    [
        ("white", (1.0, 1.0, 1.0)),
        ("random", (0.0, 0.0, 0.0)),
        ("last_sample", None),
        ([0.0, 0.5, 1.0], (0.0, 0.5, 1.0)),
    ],
)
def test_background(tmp_path: Path, said: Any, background: Any) -> None:
    assert read(saved(tmp_path, nerfacto_torch(), model={"background_color": said})).scene.background == background


def test_the_transform_of_the_data_set_is_inverted(tmp_path: Path) -> None:
    """p_ns = scale (T [p; 1]) (layouts 7.5): a point of the data set goes there and comes back."""
    transform = [[0.0, -1.0, 0.0, 0.5], [1.0, 0.0, 0.0, -0.25], [0.0, 0.0, 1.0, 2.0]]
    path = saved(tmp_path, nerfacto_torch())
    (tmp_path / "dataparser_transforms.json").write_text(json.dumps({"transform": transform, "scale": 0.25}))
    p = np.array([0.3, -0.7, 1.1])
    inside = 0.25 * (np.array(transform) @ [*p, 1.0])
    np.testing.assert_allclose((np.array(read(path).scene.world) @ [*inside, 1.0])[:3], p, atol=1e-12)
    for bad in (
        "{",
        '{"transform": [[1, 2], [3]], "scale": 1}',
        '{"transform": [[0,0,0,0],[0,0,0,0],[0,0,0,0]], "scale": 1}',
    ):
        (tmp_path / "dataparser_transforms.json").write_text(bad)
        with pytest.raises(InputError, match="transform"):
            read(path)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [(None, "mean"), ("mean", "mean"), ("zero", "zero"), ("2", "2"), ("3", None), ("-1", None), ("first", None)],
)
def test_appearance(tmp_path: Path, choice: str | None, expected: str | None) -> None:
    state = nerfacto_torch()
    path = saved(tmp_path, state)
    extra = {} if choice is None else {"appearance": choice}
    if expected is None:
        with pytest.raises(InputError, match=r"not mean, zero, or an image in 0\.\.2"):
            read(path, extra=extra)
        return
    table = state["field.embedding_appearance.embedding.weight"].double()
    values = {"mean": table.mean(0), "zero": table[0] * 0, "2": table[2]}[expected]
    np.testing.assert_allclose(read(path, extra=extra).config["color_constants"], values.numpy(), rtol=1e-6, atol=1e-9)


def test_the_programs_own_choice_of_appearance(tmp_path: Path) -> None:
    path = saved(tmp_path, nerfacto_torch(), model={"use_average_appearance_embedding": False})
    assert not any(read(path).config["color_constants"])
    bare = {k: v for k, v in nerfacto_torch(appearance=0).items() if "embedding" not in k}
    path = saved(tmp_path, bare)
    assert read(path).config["color_constants"] is None
    with pytest.raises(InputError, match="no appearance embedding"):
        read(path, extra={"appearance": "1"})


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "model", "match"),
    [
        ({"field.aabb": None}, {}, r"field\.aabb.*missing"),
        ({"field.aabb": torch.zeros(2, 3)}, {}, r"field\.aabb.*empty"),
        ({"field.mlp_base.model.0.hash_table": torch.zeros(9, 2)}, {}, "hash_table"),
        ({"field.mlp_base.model.1.layers.0.weight": torch.zeros(64, 30)}, {}, r"layers\.0\.weight.*\[\*, 8\]"),
        ({"field.mlp_base.model.1.layers.1.bias": None}, {}, r"layers\.1\.bias.*missing"),
        ({"field.mlp_head.layers.0.weight": torch.zeros(64, 40)}, {}, r"mlp_head\.layers\.0\.weight"),
        (linear("field.mlp_head.layers.2", 4, 64), {}, "4 outputs"),
        ({"field.deformation.weight": torch.zeros(3)}, {}, r"field\.deformation\.weight.*no place in nerfacto"),
        ({"field.max_res": torch.tensor(0)}, {}, "max_res is 0"),
        ({"field.num_levels": torch.tensor(99)}, {}, "num_levels is 99"),
        ({}, {"base_res": 5000}, "base_res"),
        ({}, {"base_res": "many"}, "base_res: 'many'"),
        ({}, {"average_init_density": "low"}, "average_init_density"),
        ({}, {"average_init_density": 0}, "not positive"),
        ({}, {"disable_scene_contraction": "maybe"}, "disable_scene_contraction"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path: Path, changes: dict[str, Any], model: dict[str, Any], match: str) -> None:
    state = {k: v for k, v in (nerfacto_torch() | changes).items() if v is not None}
    path = saved(tmp_path, state, model=model)
    with pytest.raises(InputError, match=match) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_configs_that_are_none(tmp_path: Path) -> None:
    path = saved(tmp_path, nerfacto_torch())
    for text, match in (("a: 1", "no pipeline.model"), ("[", "YAML"), ("- 1", "no pipeline.model")):
        (tmp_path / "config.yml").write_text(text)
        with pytest.raises(InputError, match=match):
            read(path)
    (tmp_path / "config.yml").write_text(config(disable_scene_contraction=True))
    assert read(path).architecture == "ngp"


def test_probe(tmp_path: Path) -> None:
    def score(state: dict[str, Any], **top: Any) -> float:
        match = probe(open_manifest(saved(tmp_path, state, **top)))
        return 0.0 if match is None else match.score

    assert score(nerfacto_torch()) > 0.9
    assert score({"gauss_params.means": torch.zeros(2, 3)}) < 0.3
    assert score({"other.weight": torch.zeros(2, 3)}) < 0.3
    assert score(nerfacto_torch(), prefix="something.") == 0.0
    with pytest.raises(InputError, match="Gaussian"):
        read(saved(tmp_path, {"gauss_params.means": torch.zeros(2, 3)}))
