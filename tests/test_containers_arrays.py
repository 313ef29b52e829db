"""npy, npz, safetensors, json, folders: checked against numpy and the safetensors library."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pvdconvert.containers import open_manifest
from pvdconvert.containers import safetensors as ours
from pvdconvert.errors import InputError, OutputError
from pvdconvert.plugin import ArrayTensor

DTYPES = [
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
]


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return {d: (rng.normal(size=(2, 3)) * 50).astype(d) for d in DTYPES}


@pytest.mark.parametrize("dtype", [*DTYPES, ">f4", "complex64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, dtype: str, order: Any) -> None:
    x = np.asarray(np.arange(12).reshape(3, 4), dtype=dtype, order=order)
    np.save(tmp_path / "x.npy", x)
    m = open_manifest(tmp_path / "x.npy")
    assert m.kind == "npy"
    np.testing.assert_array_equal(m.tensors["array"].numpy(), x)
    assert m.tensors["array"].shape == (3, 4)


def test_text_arrays(tmp_path: Path) -> None:
    for value, expected in ((np.array("é"), "é"), (np.array(["ab", "c"]), ["ab", "c"]), (np.array(b"xy"), "xy")):
        np.save(tmp_path / "x.npy", value)
        assert open_manifest(tmp_path / "x.npy").tree == expected


def test_object_npy_is_read_without_unpickling(tmp_path: Path) -> None:
    x = np.empty(3, object)
    x[:] = [np.eye(2, dtype=np.float32), np.arange(3.0), "name"]
    np.save(tmp_path / "x.npy", x, allow_pickle=True)
    m = open_manifest(tmp_path / "x.npy")
    np.testing.assert_array_equal(m.tensors["0"].numpy(), np.eye(2))
    np.testing.assert_array_equal(m.tensors["1"].numpy(), [0, 1, 2])
    assert m.meta["2"] == "name"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_stored_and_deflated(tmp_path: Path, save: Any) -> None:
    named = arrays() | {"text": np.array("SH9"), "zero": np.zeros((64, 64), np.float32)}
    save(tmp_path / "x.npz", **named)
    m = open_manifest(tmp_path / "x.npz")
    assert m.kind == "npz"
    assert set(m.tensors) == set(named) - {"text"}
    assert m.meta["text"] == "SH9"
    for key, tensor in m.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), named[key])
        assert tensor.dtype == str(named[key].dtype)


@pytest.mark.parametrize("cut", [3, 9, 40, 130, -1])
def test_truncated_npy(tmp_path: Path, cut: int) -> None:
    np.save(tmp_path / "x.npy", np.zeros(9))
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data[:cut])
    if cut == 3:
        assert open_manifest(tmp_path / "x.npy").kind == "unknown"
        return
    with pytest.raises(InputError, match=r"x\.npy.*(truncated|npy header)"):
        open_manifest(tmp_path / "x.npy")


def test_safetensors_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(arrays(), path, {"key": "value"})
    m = open_manifest(path)
    assert m.kind == "safetensors"
    assert m.meta == {"key": "value"}
    for key, expected in arrays().items():
        np.testing.assert_array_equal(m.tensors[key].numpy(), expected)


def test_the_library_opens_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    given = arrays() | {"empty": np.zeros((0, 2), np.float32), "scalar": np.array(1.5)}
    ours.write(path, {k: ArrayTensor(v) for k, v in given.items()}, {"b": "2", "a": "é"})
    back = safetensors.numpy.load_file(path)
    assert set(back) == set(given)
    for key, expected in given.items():
        np.testing.assert_array_equal(back[key], expected)
    assert dict(open_manifest(path).meta) == {"a": "é", "b": "2"}
    shuffled = dict(reversed(list(given.items())))
    ours.write(tmp_path / "y.safetensors", {k: ArrayTensor(v) for k, v in shuffled.items()}, {"a": "é", "b": "2"})
    assert (tmp_path / "y.safetensors").read_bytes() == path.read_bytes()


def test_bfloat16_comes_as_float32(tmp_path: Path) -> None:
    exact = np.array([1.0, -2.5, 3e38, 0.0, np.inf], np.float32)
    raw = (exact.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header = json.dumps({"x": {"dtype": "BF16", "shape": [5], "data_offsets": [0, 10]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw)
    x = open_manifest(path).tensors["x"]
    assert x.dtype == "bfloat16"
    np.testing.assert_allclose(x.numpy(), exact, rtol=1e-2)
    assert x.numpy().dtype == np.float32
    ours.write(tmp_path / "y.safetensors", {"x": x}, {})
    np.testing.assert_array_equal(open_manifest(tmp_path / "y.safetensors").tensors["x"].numpy(), x.numpy())


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left"):
        ours.write(Path("/dev/full"), {"x": ArrayTensor(np.zeros(1 << 16))}, {})


def test_json_and_msgpack_and_gzip_are_recognised(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a").write_text(' {"snapshot": {"n": 1}}')
    assert open_manifest(tmp_path / "a").tree == {"snapshot": {"n": 1}}
    (tmp_path / "b").write_bytes(b"\x81\xa8snapshot\x80")
    assert open_manifest(tmp_path / "b").kind == "msgpack"
    (tmp_path / "c").write_bytes(gzip.compress(b"hello"))
    assert open_manifest(tmp_path / "c").kind == "gzip"


def test_folders_list_checkpoints_and_do_not_follow_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    folder = tmp_path / "folder"
    (folder / "sub" / "deeper").mkdir(parents=True)
    outside.mkdir()
    for place in (outside, folder, folder / "sub", folder / "sub" / "deeper"):
        np.save(place / "x.npy", np.zeros(2))
    (folder / "link.npy").symlink_to(outside / "x.npy")
    (folder / "linked").symlink_to(outside)
    (folder / "notes.txt").write_text("not a checkpoint")
    (folder / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00")
    m = open_manifest(folder)
    assert [str(c.path.relative_to(folder)) for c in m.children] == ["x.npy", "sub/x.npy"]
    assert [name for name, _ in m.problems] == ["broken.npy"]
    assert m.siblings() == ("broken.npy", "notes.txt", "x.npy")
    assert m.sha256() == open_manifest(folder).sha256()


def test_siblings(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(2))
    (tmp_path / "config.yml").write_text("a: 1")
    (tmp_path / "latin").write_bytes(b"\xe9")
    m = open_manifest(tmp_path / "x.npy")
    assert m.siblings() == ("config.yml", "latin", "x.npy")
    assert m.sibling_text("config.yml") == "a: 1"
    assert m.open_sibling("x.npy").kind == "npy"
    assert m.sha256() == hashlib.sha256((tmp_path / "x.npy").read_bytes()).hexdigest()
    for name in ("missing", "../x.npy", "/etc/passwd"):
        with pytest.raises(InputError, match="no such file beside"):
            m.sibling_text(name)
    with pytest.raises(InputError, match="cannot be read as text"):
        m.sibling_text("latin")
    with pytest.raises(InputError, match="more than 2 bytes"):
        m.sibling_text("config.yml", 2)


def test_missing_empty_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        open_manifest(tmp_path / "none")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        open_manifest(tmp_path / "empty")
    with pytest.raises(InputError, match="not a regular file"):
        open_manifest(Path("/dev/zero"))
