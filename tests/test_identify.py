"""Identification by content: the order of refusals, ties, probes that fail, folders, and real files."""

from __future__ import annotations

import gzip
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvdconvert.containers import open_manifest, torch_zip_writer
from pvdconvert.errors import InputError, UnknownError, UnsafeError
from pvdconvert.identify import GOOD, ask, examine, identify
from pvdconvert.plugin import FORMAT_GROUP, FormatSpec, Match
from pvdconvert.registry import Origin, Registry, default
from pvdconvert.resemblance import grouped

Probe = Callable[[Any], Any]


class Code:
    """Stands for a format's code; never asked here."""


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Registry]:
    """A registry of the given probes by name."""

    def make(**probes: Probe) -> Registry:
        module = types.ModuleType("fake_formats")
        monkeypatch.setitem(sys.modules, "fake_formats", module)
        vars(module).update(probes, Code=Code)
        origins = []
        for name in probes:
            spec = FormatSpec(name, name, f"fake_formats:{name}", "fake_formats:Code", ("nerf",))
            origins.append(Origin(name, f"fake:{name}", "pvdconvert", "0", lambda spec=spec: spec))  # type: ignore[misc]
        return Registry(lambda group: origins if group == FORMAT_GROUP else [])

    return make


def fixed(score: float, reason: str = "because") -> Probe:
    return lambda manifest: Match(score, reason)


@pytest.fixture
def array(tmp_path: Path) -> Path:
    path = tmp_path / "weights.anything"
    with path.open("wb") as file:
        np.save(file, np.zeros((2, 3)))
    return path


def test_the_best_score_wins_and_all_are_listed(formats: Any, array: Path) -> None:
    found = identify(array, None, formats(a=fixed(0.5, "half"), b=fixed(0.9, "most"), c=lambda m: None))
    assert found.format == "b"
    assert found.match == Match(0.9, "most")
    assert [(c.format, c.score) for c in found.candidates] == [("b", 0.9), ("a", 0.5), ("c", 0.0)]
    assert found.manifest.kind == "npy"


def test_a_tie_lists_the_candidates(formats: Any, array: Path) -> None:
    with pytest.raises(UnknownError, match=r"a \(one\) or b \(two\).*--from a") as caught:
        identify(array, None, formats(a=fixed(0.8, "one"), b=fixed(0.8, "two"), c=fixed(0.7)))
    assert caught.value.exit_code == 4


def test_nothing_fits(formats: Any, array: Path) -> None:
    with pytest.raises(
        UnknownError, match=r"an npy file of 1 tensor with 6 numbers: array 2x3; closest: b \(nearly\).*--from"
    ):
        identify(array, None, formats(a=lambda m: None, b=fixed(0.1, "nearly")))


def test_a_probe_that_fails_is_a_verdict_not_a_crash(formats: Any, array: Path) -> None:
    def broken(manifest: Any) -> None:
        raise ZeroDivisionError("oh\nno")

    found = identify(array, None, formats(a=broken, b=fixed(0.9), c=lambda m: "nonsense"))
    assert found.format == "b"
    reasons = {c.format: c.reason for c in found.candidates}
    assert reasons["a"] == "its probe failed: ZeroDivisionError: oh no"
    assert reasons["c"].startswith("its probe failed")


def test_a_probe_that_refuses_in_words_says_why_it_does_not_fit(formats: Any, array: Path) -> None:
    def wordy(manifest: Any) -> None:
        raise InputError(f"{manifest.path}: a: tensor 'x' has 2 axes, not 1")

    found = identify(array, None, formats(a=wordy, b=fixed(0.9)))
    assert {c.format: c.reason for c in found.candidates}["a"] == "tensor 'x' has 2 axes, not 1"


def test_from_forces(formats: Any, array: Path) -> None:
    registry = formats(alpha=fixed(0.9), beta=lambda m: None)
    forced = identify(array, "beta", registry)
    assert (forced.format, forced.match) == ("beta", None)
    agreed = identify(array, "alpha", registry)
    assert agreed.match is not None
    with pytest.raises(UnknownError, match="did you mean 'alpha'"):
        identify(array, "alpa", registry)


def test_a_missing_file_is_said_before_anything_else(formats: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        identify(tmp_path / "none.pth", None, formats(a=fixed(0.9)))
    with pytest.raises(InputError, match="no such file"):
        identify(tmp_path / "none.pth", "unknown", formats(a=fixed(0.9)))
    assert caught.value.exit_code == 3


def test_suffixes_are_not_looked_at(formats: Any, tmp_path: Path) -> None:
    for name in ("x.pth", "x.npz", "x", "x.png"):
        with (tmp_path / name).open("wb") as file:
            np.save(file, np.zeros(3))
        assert identify(tmp_path / name, None, formats(a=lambda m: Match(0.9, m.kind))).match == Match(0.9, "npy")


def test_folders(formats: Any, tmp_path: Path) -> None:
    registry = formats(a=lambda m: Match(0.9, "x") if m.kind == "npy" else None)
    with pytest.raises(UnknownError, match="a folder without a checkpoint"):
        identify(tmp_path, None, registry)
    np.save(tmp_path / "one.npy", np.zeros(3))
    assert identify(tmp_path, None, registry).manifest.path == tmp_path / "one.npy"
    np.save(tmp_path / "two.npy", np.zeros(3))
    with pytest.raises(UnknownError, match=r"several checkpoints: one\.npy, two\.npy.*name one"):
        identify(tmp_path, None, registry)
    whole = formats(a=lambda m: Match(0.9, "x"), b=lambda m: Match(0.95, "y") if m.kind == "folder" else None)
    assert identify(tmp_path, None, whole).manifest.path == tmp_path


def test_a_folder_of_one_bad_file_says_what_is_wrong_with_it(formats: Any, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(InputError, match=r"x\.npy.*truncated"):
        identify(tmp_path, None, formats(a=fixed(0.0)))


REAL = {
    "bmild-lego": "bmild",
    "bmild-lego/model_200000.npy": "bmild",
    "krrish94-lego": "krrish94",
    "krrish94-fern/checkpoint249999.ckpt": "krrish94",
    "jiayi-lego100": "jiayi",
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(data_root: Path, name: str) -> None:
    found = identify(data_root / "checkpoints" / name)
    assert found.format == REAL[name]
    assert found.match is not None
    assert found.match.score >= 0.9
    assert [c.format for c in found.candidates if c.score > 0.3] == [REAL[name]]


def test_other_programs_files_are_not_claimed(data_root: Path) -> None:
    """What no format reads yet of the peers' files is refused in one line that says what it looks like."""
    files = [p for p in sorted((data_root / "checkpoints/peers").glob("**/*")) if p.is_file()]
    files = [p for p in files if p.suffix in (".tar", ".pth", ".th", ".npz", ".ckpt")]
    assert len(files) > 8
    for path in files:
        candidates = ask(open_manifest(path), default())
        assert not any(c.score >= GOOD for c in candidates if c.format in {*REAL.values(), "torch-ngp"}), path
        if candidates[0].score < GOOD:
            with pytest.raises(UnknownError, match=r"\d+ tensors? with [\d,]+ numbers"):
                identify(path)


def test_the_module_pickle_is_refused_as_file_and_as_folder(data_root: Path) -> None:
    for path in ("refuse", "refuse/whole-module-pickle.pt"):
        with pytest.raises(UnsafeError, match="save the state_dict instead") as caught:
            identify(data_root / "checkpoints" / path)
        assert caught.value.exit_code == 8


# ------------------------------------------------------------------------------- files of nobody that we know


def torch_file(path: Path, shapes: dict[str, tuple[int, ...]], wrap: str = "") -> Path:
    tensors: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    torch_zip_writer.write(path, {wrap: tensors} if wrap else tensors)
    return path


RESNET = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "layer1.0.conv1.weight": (64, 64, 3, 3),
          "layer2.0.downsample.0.weight": (128, 64, 1, 1), "fc.weight": (10, 128), "fc.bias": (10,)}  # fmt: skip
STRANGERS: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "resnet": (RESNET, r"6 tensors with 55,\d\d\d numbers that looks like a ResNet-like convolutional network: conv1"),
    "unet": ({"model.input_blocks.0.weight": (8, 4, 3, 3), "model.output_blocks.0.weight": (4, 8, 3, 3)}, "U-Net"),
    "vit": ({"patch_embed.proj.weight": (8, 3, 4, 4), "blocks.0.attn.qkv.weight": (24, 8),
             "blocks.0.attn.proj.weight": (8, 8)}, "a vision transformer"),
    "bert": ({"l.0.attention.q.weight": (8, 8), "l.0.attention.k.weight": (8, 8)}, "a transformer"),
    "lora": ({"x.lora_A.weight": (4, 8), "x.lora_B.weight": (8, 4)}, "LoRA"),
    "lstm": ({"weight_ih_l0": (16, 4), "weight_hh_l0": (16, 4)}, "a recurrent network"),
    "neus": ({"sdf_network_fine.lin0.weight": (8, 39), "deviation.variance": ()}, "a signed-distance field"),
    "voxels": ({"volume": (1, 4, 16, 16, 16)}, "a dense voxel grid"),
    "planes": ({f"plane.{k}": (1, 8, 32, 32) for k in range(3)}, "a field of feature planes"),
    "hash": ({"table": (8192, 2), "head.weight": (4, 32)}, "a field with a table of features"),
    "mlp": ({"a.weight": (64, 63), "a.bias": (64,), "b.weight": (4, 64)}, r"a position in 10 frequencies \(63 inputs"),
    "plain mlp": ({"a.weight": (64, 17), "b.weight": (4, 64)}, "a multi-layer perceptron"),
    "adam": ({"state.0.exp_avg": (3, 3), "state.0.exp_avg_sq": (3, 3)}, "the state of an optimizer"),
    "nothing": ({"x": (3,)}, r"1 tensor with 3 numbers: x 3;"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_described(tmp_path: Path, name: str) -> None:
    shapes, words = STRANGERS[name]
    with pytest.raises(UnknownError, match=words) as caught:
        identify(torch_file(tmp_path / "x.pth", shapes))
    assert "closest: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900


def test_what_came_closest_says_why_it_does_not_fit(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "x.pth", {"encoder.embeddings": (64, 2), "encoder.offsets": (2,)}, "model")
    with pytest.raises(UnknownError, match=r"closest: .*torch-ngp \(has 'encoder.embeddings' but not 'sigma_net"):
        identify(path)


SPLATS = {"means": (9, 3), "scales": (9, 3), "quats": (9, 4), "opacities": (9,), "sh0": (9, 1, 3)}


@pytest.mark.parametrize("prefix", ["", "splats.", "pipeline._model.gauss_params."])
def test_splats_are_named(tmp_path: Path, prefix: str) -> None:
    path = torch_file(tmp_path / "x.ckpt", {prefix + k: v for k, v in SPLATS.items()})
    with pytest.raises(UnknownError, match="9 3D Gaussian splats: not supported"):
        identify(path)


def test_splats_of_the_original_program_and_of_ply_and_spz(tmp_path: Path) -> None:
    rows = [(9, 3), (9, 1, 3), (9, 15, 3), (9, 3), (9, 4), (9, 1), (9,)]
    torch_zip_writer.write(tmp_path / "chkpnt30000.pth", ((3, *(np.zeros(s, np.float32) for s in rows)), 30000))
    header = b"ply\nformat binary_little_endian 1.0\nelement vertex 1234\n"
    header += b"".join(b"property float %s\n" % n for n in (b"x", b"f_dc_0", b"opacity", b"scale_0", b"rot_0"))
    (tmp_path / "point_cloud.ply").write_bytes(header + b"end_header\n" + bytes(64))
    (tmp_path / "x.spz").write_bytes(gzip.compress(b"NGSP" + bytes(60)))
    for name in ("chkpnt30000.pth", "point_cloud.ply", "x.spz"):
        with pytest.raises(UnknownError, match="3D Gaussian splats: not supported") as caught:
            identify(tmp_path / name)
        assert caught.value.exit_code == 4


FOREIGN = {
    b"ply\nelement vertex 8\nelement face 12\nend_header\n": "a triangle mesh",
    b"ply\nelement vertex 8\nend_header\n": "a cloud of 8 points",
    b"<!DOCTYPE HTML>\n<html>": "a web page, not the file behind its link",
    b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull",
    b"\x89HDF\r\n\x1a\n": "HDF5",
    b"\x89PNG\r\n": "a PNG picture",
    b"BZh91AY": "unpack it first",
    bytes(257) + b"ustar\x0000" + bytes(250): "a tar archive",
    bytes(40) + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb": "TensorFlow checkpoint",
}


@pytest.mark.parametrize("data", FOREIGN)
def test_what_is_no_checkpoint_at_all_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(InputError, match=FOREIGN[data]) as caught:
        identify(tmp_path / "x.pth")
    assert caught.value.exit_code == 3


def test_groups_take_as_many_words_as_tell_parts_apart() -> None:
    names = [f"model.{part}.{k}" for part in ("encoder", "sigma", "color") for k in range(2)]
    assert list(grouped(names)) == ["model.encoder", "model.sigma", "model.color"]
    assert list(grouped(f"a.{k}.w" for k in range(40))) == ["a"]
    assert list(grouped(["x", "y", "z.0", "z.1"])) == ["x", "y", "z"]
    assert grouped([]) == {}


def test_examine_returns_what_identify_raises(formats: Any, array: Path) -> None:
    seen = examine(array, None, formats(a=fixed(0.1, "nearly")))
    assert seen.found is None
    assert isinstance(seen.error, UnknownError)
    assert (seen.manifest.kind, [c.reason for c in seen.candidates]) == ("npy", ["nearly"])
