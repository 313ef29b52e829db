"""Torch files, both layouts: what torch.save wrote is what we read, and what we write torch.load opens."""

from __future__ import annotations

import argparse
import collections
import pathlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pvdconvert.containers import Manifest, Stub, open_manifest, torch_zip_writer
from pvdconvert.errors import InputError, OutputError, RequestError, UnsafeError

LAYOUTS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(path: Path, value: Any, zipped: bool = True) -> Manifest:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return open_manifest(path)


@LAYOUTS
@pytest.mark.parametrize(
    "name", ["float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_every_dtype_is_read_as_torch_wrote_it(tmp_path: Path, zipped: bool, name: str) -> None:
    dtype = getattr(torch, name)
    x = (torch.arange(24).reshape(2, 3, 4) - 5).to(dtype)
    m = save(tmp_path / "a.pt", {"x": x}, zipped)
    assert m.kind == ("torch-zip" if zipped else "torch-legacy")
    t = m.tensors["x"]
    assert t.shape == (2, 3, 4)
    assert t.dtype == str(dtype).removeprefix("torch.")
    expected = x.float().numpy() if dtype is torch.bfloat16 else x.numpy()
    np.testing.assert_array_equal(t.numpy(), expected)
    assert t.numpy().dtype == expected.dtype
    assert not t.numpy().flags.writeable
    assert t.numpy().flags.aligned


@LAYOUTS
def test_views_and_shared_storages(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(60.0)
    views = {
        "t": base[:12].reshape(3, 4).t(),
        "offset": base[7:19:3],
        "same": base,
        "scalar": base[5],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[2:8]),
    }
    m = save(tmp_path / "a.pt", views, zipped)
    for name, view in views.items():
        np.testing.assert_array_equal(m.tensors[name].numpy(), view.detach().numpy())


@LAYOUTS
def test_nested_values_and_unknown_classes_are_inert(tmp_path: Path, zipped: bool) -> None:
    value = {
        "epoch": 3,
        "big": 1 << 70,
        "pi": 3.25,
        "none": None,
        "flags": [True, False, (1, "two")],
        "state_dict": collections.OrderedDict(w=torch.ones(2)),
        "args": argparse.Namespace(lr=0.1, name="x"),
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, a=[1]),
        "path": pathlib.PurePosixPath("/a/b"),
        "set": {1, 2},
        "array": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "scalar": np.float64(0.125),
        "device": torch.device("cpu"),
        "size": torch.Size([2, 3]),
        "dtype": torch.float16,
    }
    m = save(tmp_path / "a.pt", value, zipped)
    tree = m.tree
    assert {k: tree[k] for k in ("epoch", "big", "pi", "none", "flags")} == {
        k: value[k] for k in ("epoch", "big", "pi", "none", "flags")
    }
    assert isinstance(tree["args"], Stub)
    assert tree["args"].name == "argparse.Namespace"
    assert tree["args"].state == {"lr": 0.1, "name": "x"}
    assert tree["counter"] == {"a": 2, "b": 1}
    assert tree["default"] == {"a": [1]}
    assert tree["path"].endswith("a/b")
    assert tree["set"] == {1, 2}
    assert tree["scalar"] == 0.125
    assert tree["size"] == (2, 3)
    assert tree["device"] == "cpu"
    np.testing.assert_array_equal(m.tensors["array"].numpy(), value["array"])
    np.testing.assert_array_equal(m.tensors["state_dict.w"].numpy(), [1.0, 1.0])
    assert m.meta["epoch"] == 3
    assert m.meta["flags.2.1"] == "two"


def test_numpy_1_and_python_2_names_are_known(tmp_path: Path) -> None:
    """Files of numpy < 2 say numpy.core, those of python 2 hold array bytes as text."""
    import pickle

    data = pickle.dumps(np.arange(3.0), protocol=2).replace(b"numpy._core", b"numpy.core")
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    np.testing.assert_array_equal(open_manifest(path).tensors["array"].numpy(), [0.0, 1.0, 2.0])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    import pickle

    value = {
        "text": "é" * 300,
        "bytes": bytes(range(256)) * 2,
        "numbers": [0, 255, 256, 70000, -1, 2**40, 0.1],
        "tuple": (1, 2, 3, 4),
        "frozen": frozenset({1}),
        "keys": {1: "a", "k": None},
        "array": bytearray(b"xy"),
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    assert open_manifest(path).tree == value


@LAYOUTS
def test_a_whole_module_is_refused_and_named(tmp_path: Path, zipped: bool) -> None:
    with pytest.raises(UnsafeError, match=r"Linear.*save the state_dict instead") as caught:
        save(tmp_path / "a.pt", torch.nn.Linear(2, 3), zipped)
    assert caught.value.exit_code == 8
    with pytest.raises(UnsafeError, match="Linear"):
        save(tmp_path / "b.pt", {"net": torch.nn.Linear(2, 3), "epoch": 1}, zipped)


def test_a_module_beside_a_state_dict_does_not_hide_it(tmp_path: Path) -> None:
    m = save(
        tmp_path / "a.pt", {"state_dict": {"w": torch.zeros(2)}, "loss": torch.nn.MSELoss(), "m": torch.nn.Linear(1, 1)}
    )
    assert list(m.tensors) == ["state_dict.w"]


def test_a_storage_is_read_on_demand(tmp_path: Path) -> None:
    m = save(tmp_path / "a.pt", {"x": torch.zeros(1 << 20), "y": torch.arange(3.0)})
    view = m.tensors["x"].numpy()
    assert view.base is not None  # a view of the mapped file, no copy
    assert m.size > 1 << 22


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9, 0.999])
@LAYOUTS
def test_truncated(tmp_path: Path, zipped: bool, keep: float) -> None:
    path = tmp_path / "a.pt"
    save(path, {f"k{i}": torch.randn(50) for i in range(9)}, zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(InputError, match=r"a\.pt") as caught:
        open_manifest(path)
    assert "\n" not in str(caught.value)


def test_real_files_open_as_torch_opens_them(data_root: Path) -> None:
    for name in ("krrish94-fern/checkpoint249999.ckpt", "jiayi-lego100/basic_nerf_lego_10000_100x100.pt"):
        path = data_root / "checkpoints" / name
        ours, theirs = open_manifest(path), torch.load(path, map_location="cpu", weights_only=True)
        for key, state in theirs.items():
            if key.endswith("state_dict") and not key.startswith("optimizer"):
                for k, v in state.items():
                    np.testing.assert_array_equal(ours.tensors[f"{key}.{k}"].numpy(), v.numpy())


def test_the_real_module_pickle_is_refused(data_root: Path) -> None:
    with pytest.raises(UnsafeError, match=r"nerf\.NeRFModel.*save the state_dict instead"):
        open_manifest(data_root / "checkpoints/refuse/whole-module-pickle.pt")


# ------------------------------------------------------------------------------------------------- writing


def content() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    arrays = {
        d: (rng.normal(size=(3, 4)) * 9).astype(d) for d in ("float32", "float64", "float16", "int64", "uint8", "bool")
    }
    model = collections.OrderedDict(
        arrays, empty=np.zeros((0, 3), np.float32), fortran=np.asfortranarray(arrays["float32"])
    )
    return {"epoch": 3, "big": 1 << 40, "negative": -(1 << 33), "f": 0.1, "s": "hé", "list": [1, None, True, (2, 3.5)],
            "model": model, "scalar": np.array(2.5), "none": {}}  # fmt: skip


def test_torch_opens_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    value = content()
    torch_zip_writer.write(path, value)
    back = torch.load(path, weights_only=True)
    assert list(back) == list(value)
    assert {k: back[k] for k in ("epoch", "big", "negative", "f", "s", "list", "none")} == {
        k: value[k] for k in ("epoch", "big", "negative", "f", "s", "list", "none")
    }
    assert isinstance(back["model"], collections.OrderedDict)
    for key, array in value["model"].items():
        np.testing.assert_array_equal(back["model"][key].numpy(), array)
        assert back["model"][key].numpy().dtype == array.dtype
        assert back["model"][key].is_contiguous()
    assert back["scalar"].shape == ()
    torch.nn.Linear(4, 3, bias=False).load_state_dict({"weight": back["model"]["float32"]})


def test_our_own_reader_and_mapped_loading_open_it_too(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch_zip_writer.write(path, content())
    m = open_manifest(path)
    for key, array in content()["model"].items():
        np.testing.assert_array_equal(m.tensors[f"model.{key}"].numpy(), array)
    mapped = torch.load(path, weights_only=True, mmap=True)
    np.testing.assert_array_equal(mapped["model"]["float64"].numpy(), content()["model"]["float64"])


def test_writing_is_deterministic_and_aligned(tmp_path: Path) -> None:
    import zipfile

    torch_zip_writer.write(tmp_path / "a.pth", content())
    torch_zip_writer.write(tmp_path / "b.pth", content())
    raw = (tmp_path / "a.pth").read_bytes()
    assert raw == (tmp_path / "b.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            at = info.header_offset
            start = (
                at
                + 30
                + int.from_bytes(raw[at + 26 : at + 28], "little")
                + int.from_bytes(raw[at + 28 : at + 30], "little")
            )
            assert start % 64 == 0, info.filename


def test_what_a_torch_file_cannot_hold_is_said(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="a set"):
        torch_zip_writer.write(tmp_path / "a.pth", {"x": {1}})
    with pytest.raises(RequestError, match="complex64"):
        torch_zip_writer.write(tmp_path / "a.pth", {"x": np.zeros(2, np.complex64)})
    with pytest.raises(OutputError, match="cannot be written"):
        torch_zip_writer.write(tmp_path / "no" / "a.pth", {})


def test_writes_numpy_arrays_where_a_program_wants_them(tmp_path: Path) -> None:
    """torch's own unpickler builds the array; so does ours."""
    array = np.random.default_rng(0).integers(0, 256, 300, dtype=np.uint8)
    torch_zip_writer.write(tmp_path / "a.pth", {"mask": torch_zip_writer.Numpy(array), "shape": (1, 2)})
    back = torch.load(tmp_path / "a.pth", weights_only=False)
    assert type(back["mask"]) is np.ndarray
    np.testing.assert_array_equal(back["mask"], array)
    np.testing.assert_array_equal(open_manifest(tmp_path / "a.pth").tensors["mask"].numpy(), array)
    with pytest.raises(RequestError):
        torch_zip_writer.write(tmp_path / "a.pth", {"x": torch_zip_writer.Numpy(array.astype(np.float32))})
