"""msgpack, gzip, zlib: checked against the msgpack library's writer; hostile bytes are refused in one line."""

from __future__ import annotations

import contextlib
import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvdconvert.containers import Manifest, Stub, inflate, open_manifest
from pvdconvert.containers import msgpack as ours
from pvdconvert.errors import InputError

PAIRS = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=20),
    max_leaves=30,
)


def put(folder: Path, raw: bytes) -> Manifest:
    path = folder / "x"
    path.write_bytes(raw)
    return open_manifest(path)


def refuse(raw: bytes, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        ours.read(memoryview(raw), "x")
    assert "\n" not in str(caught.value)


def flax_array(x: np.ndarray[Any, Any], code: int = 1) -> msgpack.ExtType:
    """As flax.serialization writes an array: the bytes of its own three-tuple in an ext."""
    return msgpack.ExtType(code, msgpack.packb((x.shape, x.dtype.name, x.tobytes("C")), use_bin_type=True))


@given(PAIRS, st.booleans())
def test_whatever_the_library_packs_is_read(value: Any, single: bool) -> None:
    raw = msgpack.packb(value, use_single_float=False)
    assert ours.read(memoryview(raw), "x") == value
    if single and isinstance(value, float):
        short = msgpack.packb(1.5, use_single_float=True)
        assert len(short) == 5
        assert ours.read(memoryview(short), "x") == 1.5


@pytest.mark.parametrize("size", [0, 3, 31, 32, 255, 256, 65535, 65536])
def test_every_width_of_text_blob_list_and_map(size: int) -> None:
    value = ["a" * size, list(range(size)), {str(k): k for k in range(size)}]
    assert ours.read(memoryview(msgpack.packb(value)), "x") == value
    blob = ours.read(memoryview(msgpack.packb(bytes(size))), "x")
    assert blob.shape == (size,)
    assert blob.dtype == "uint8"


def test_blobs_stay_in_the_file_and_are_named_by_their_path(tmp_path: Path) -> None:
    x = np.arange(5, dtype=np.float16)
    m = put(tmp_path, msgpack.packb({"snapshot": {"params_binary": x.tobytes(), "n_params": 5, "list": [b"a", 7]}}))
    assert m.kind == "msgpack"
    assert list(m.tensors) == ["snapshot.params_binary", "snapshot.list.0"]
    assert dict(m.meta) == {"snapshot.n_params": 5, "snapshot.list.1": 7}
    np.testing.assert_array_equal(m.tensors["snapshot.params_binary"].numpy().view(np.float16), x)
    assert m.tensors["snapshot.params_binary"].numpy().base is not None  # a view of the map


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int32", "uint32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_flax_arrays(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    x = np.asarray(np.arange(np.prod(shape)).reshape(shape), dtype=dtype)
    m = put(tmp_path, msgpack.packb({"optimizer": {"target": {"params": {"kernel": flax_array(x)}}}}))
    got = m.tensors["optimizer.target.params.kernel"]
    assert (got.shape, got.dtype) == (shape, dtype)
    np.testing.assert_array_equal(got.numpy(), x)


def test_flax_bfloat16_scalars_complex_and_unknown_exts(tmp_path: Path) -> None:
    half = msgpack.ExtType(1, msgpack.packb(((2,), "bfloat16", bytes.fromhex("803f00c0"))))
    tree = {
        "half": half,
        "scalar": flax_array(np.array(0.25, np.float32), 3),
        "complex": msgpack.ExtType(2, msgpack.packb((1.5, -2.0))),
        "date": msgpack.Timestamp(5, 0),
        "other": msgpack.ExtType(42, b"hello"),
        "one": msgpack.ExtType(1, b"not an array"),
        "object": msgpack.ExtType(1, msgpack.packb(((1,), "object", b"12345678"))),
    }
    m = put(tmp_path, msgpack.packb(tree))
    np.testing.assert_array_equal(m.tensors["half"].numpy(), np.array([1.0, -2.0], np.float32))
    assert m.meta["scalar"] == 0.25
    assert m.tree["complex"] == 1.5 - 2.0j
    assert list(m.tensors) == ["half"]
    names = {key: m.tree[key].name for key in ("date", "other", "one", "object")}
    assert names == {"date": "msgpack.ext-1", "other": "msgpack.ext42", "one": "msgpack.ext1", "object": "msgpack.ext1"}
    assert isinstance(m.tree["other"], Stub)
    assert m.tree["other"].args == (b"hello",)


@pytest.mark.parametrize("as_maps", [False, True])
def test_flax_arrays_in_chunks(tmp_path: Path, as_maps: bool) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    def sequence(values: list[Any]) -> Any:
        return {str(k): v for k, v in enumerate(values)} if as_maps else values

    pieces = [flax_array(x.reshape(-1)[k : k + 10]) for k in range(0, 24, 10)]
    chunked = {"__msgpack_chunked_array__": True, "shape": sequence([2, 3, 4]), "chunks": sequence(pieces)}
    m = put(tmp_path, msgpack.packb({"params": {"kernel": chunked}}))
    got = m.tensors["params.kernel"]
    assert (got.shape, got.dtype) == ((2, 3, 4), "float32")
    np.testing.assert_array_equal(got.numpy(), x)
    refuse(msgpack.packb({**chunked, "shape": sequence([2, 3, 5])}), "do not add up")
    refuse(msgpack.packb({**chunked, "chunks": sequence([1, 2])}), "lacks its shape or its chunks")
    refuse(msgpack.packb({"__msgpack_chunked_array__": True}), "lacks")


GOOD = msgpack.packb({"a": [1, 2.5, "text"], "b": {"c": b"\x01" * 40, "d": None}, "e": flax_array(np.zeros(3))})


@pytest.mark.parametrize("cut", range(len(GOOD)))
def test_truncated_anywhere(cut: int) -> None:
    refuse(GOOD[:cut], "truncated or corrupt")


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"\x91" * 100_000 + b"\xc0", "nested deeper"),
        (b"\x81\xa1a" * 100_000 + b"\xc0", "nested deeper"),
        (b"\xdd\xff\xff\xff\xff" + b"\xc0" * 64, "4294967295 entries"),
        (b"\xdf\xff\xff\xff\xff" + b"\xa1a\xc0" * 64, "4294967295 entries"),
        (b"\xdd\x00\x1e\x84\x80" + b"\xc0" * 2_000_000, "2000000 entries"),
        (b"\xdc\x04\x00" + (b"\xdc\x04\x00" + b"\xc0" * 1024) * 1024, "entries are claimed"),
        (b"\xc6\xff\xff\xff\xff1234", "4294967295 bytes are claimed"),
        (b"\xdb\xff\xff\xff\xff1234", "4294967295 bytes are claimed"),
        (b"\xc9\xff\xff\xff\xff\x011234", "4294967295 bytes are claimed"),
        (b"\xc1", "begins nothing"),
        (b"\x82\xa1a\x01\xa1a\x02", "stands twice"),
        (b"\x81\xc3\x01", "no text"),
        (b"\x81\x90\x01", "no text"),
        (b"\x81\xa1a\x01\x00", "1 bytes follow its end"),
        (msgpack.packb(msgpack.ExtType(1, msgpack.packb(((1 << 40, 1 << 40), "float32", b"1234")))), "holds 4 bytes"),
        (msgpack.packb(msgpack.ExtType(1, msgpack.packb(((-4,), "uint8", b"1234")))), "impossible"),
        (msgpack.packb(msgpack.ExtType(1, msgpack.packb(([1] * 99, "uint8", b"1")))), "short tuple"),
    ],
)
def test_hostile_msgpack(raw: bytes, match: str) -> None:
    refuse(raw, match)


def test_a_matryoshka_of_exts_is_bounded() -> None:
    raw = b"\xc0"
    for _ in range(200):
        raw = msgpack.packb(msgpack.ExtType(1, raw))
    value = ours.read(memoryview(raw), "x")  # what is too deep to be an array is just another program's ext
    assert isinstance(value, Stub)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_one_error(raw: bytes) -> None:
    with contextlib.suppress(InputError):
        ours.read(memoryview(raw), "x")


TREE: dict[str, Any] = {
    "snapshot": {"params_binary": bytes(range(256)) * 400, "version": 1},
    "encoding": {"otype": "HashGrid"},
}


@pytest.mark.parametrize("level", [0, 6, 9])
@pytest.mark.parametrize("kind", ["gzip", "zlib", "gzip members"])
def test_wrapped_msgpack(tmp_path: Path, kind: str, level: int) -> None:
    raw = msgpack.packb(TREE)
    if kind == "gzip members":
        packed = b"".join(gzip.compress(raw[k : k + 40_000], level) for k in range(0, len(raw), 40_000))
    else:
        packed = gzip.compress(raw, level) if kind == "gzip" else zlib.compress(raw, level)
    m = put(tmp_path, packed)
    assert m.kind == kind.split()[0]
    assert m.size == len(packed)
    assert m.tree["encoding"] == TREE["encoding"]
    assert m.tensors["snapshot.params_binary"].numpy().tobytes() == TREE["snapshot"]["params_binary"]


def test_wrapped_json_and_other_content(tmp_path: Path) -> None:
    assert put(tmp_path, gzip.compress(b' {"a": [1]}')).tree == {"a": [1]}
    other = put(tmp_path, gzip.compress(b"\x80\x02}."))  # a pickle is not unwrapped
    assert (other.kind, other.tree) == ("gzip", None)


def test_damaged_streams(tmp_path: Path) -> None:
    raw = msgpack.packb(TREE)
    for packed in (gzip.compress(raw), zlib.compress(raw)):
        for cut in (len(packed) - 1, len(packed) - 6, len(packed) // 2):
            with pytest.raises(InputError, match="truncated"):
                put(tmp_path, packed[:cut])
        with pytest.raises(InputError, match="follow the end"):
            put(tmp_path, packed + b"garbage")
    flipped = bytearray(gzip.compress(raw))
    flipped[-6] ^= 1  # the checksum
    with pytest.raises(InputError, match="corrupt gzip"):
        put(tmp_path, bytes(flipped))
    with pytest.raises(InputError, match="follow the end"):
        put(tmp_path, zlib.compress(raw) * 2)


@pytest.mark.parametrize("window", [31, 15])
def test_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(inflate, "ALWAYS_ALLOWED", 8 << 20)
    squeezer = zlib.compressobj(9, zlib.DEFLATED, window)
    head = b"\x81\xa8snapshot\xc6" + struct.pack(">I", 32 << 20)
    packed = squeezer.compress(head) + squeezer.compress(bytes(32 << 20)) + squeezer.flush()
    with pytest.raises(InputError, match="bomb"):
        put(tmp_path, packed)


def test_too_many_members(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="follow the end"):
        put(tmp_path, gzip.compress(msgpack.packb(TREE)) + gzip.compress(b"") * 2000)


def test_no_room_to_unpack_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("r+b") as full:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda: full)
        with pytest.raises(InputError, match="set TMPDIR"):
            put(tmp_path, gzip.compress(msgpack.packb(TREE)))


def test_prose_is_no_zlib(tmp_path: Path) -> None:
    assert put(tmp_path, b"x^2 + y^2 = 1 is a circle, and nothing that anybody has compressed").kind == "unknown"


def test_thousands_of_images(tmp_path: Path) -> None:
    image = {"start": [[1.0] * 4] * 3, "end": [[1.0] * 4] * 3, "lens": {"k1": 0.0}, "focal": [1.0, 2.0]}
    m = put(tmp_path, msgpack.packb({"xforms": [image] * 9000}))
    assert len(m.tree["xforms"]) == 9000
