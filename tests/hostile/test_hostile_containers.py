"""Archives, headers and texts that attack, and mutations of sound files: each ends in a PvdError or a sound read."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvdconvert.containers import open_manifest, safetensors, torch_zip_writer
from pvdconvert.errors import PvdError
from pvdconvert.identify import identify
from pvdconvert.plugin import ArrayTensor

Refuse = Callable[..., Any]


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as target:
        for name, raw in members.items():
            target.writestr(name, raw)
    return out.getvalue()


GOOD = {"a/data.pkl": pickle.dumps({"x": 1}, 2), "a/version": b"3\n"}


def patched(data: bytes, *changes: tuple[bytes, int, bytes]) -> bytes:
    """``data`` with bytes replaced at an offset from the last occurrence of a mark."""
    out = bytearray(data)
    for mark, offset, value in changes:
        at = out.rfind(mark) + offset
        out[at : at + len(value)] = value
    return bytes(out)


CENTRAL, END = b"PK\x01\x02", b"PK\x05\x06"


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/etc/evil", "\\evil", "..\\evil", "C:\\evil", "a/data/../../../x"]
)
def test_zip_slip(refuse: Refuse, name: str, tmp_path: Path) -> None:
    assert "outside of itself" in str(refuse(archive({**GOOD, name: b"x"}), 8))
    assert not list(tmp_path.parent.glob("**/evil*"))


def test_archives_that_contradict_themselves(refuse: Refuse) -> None:
    good = archive(GOOD)
    twice = archive({"a/data.pkl": b"1", "b/data.pkl": b"2"}).replace(b"b/data.pkl", b"a/data.pkl")
    assert "twice" in str(refuse(twice, 3))
    refuse(archive({**GOOD, "b/data.pkl": b""}), 3)
    refuse(archive({"x": b"1"}), 4)
    refuse(b"PK\x03\x04" + bytes(100), 3)
    refuse(b"PK\x05\x06" + bytes(18), 4)
    refuse(good[:-22], 3)
    refuse(patched(good, (END, 12, struct.pack("<I", 0xFFFFFFFF))), 3)
    refuse(patched(good, (END, 12, struct.pack("<I", 200 << 20))), 3)
    refuse(patched(good, (CENTRAL, 8, b"\x01\x00")), 3)  # encrypted
    refuse(patched(good, (CENTRAL, 10, b"\x0e\x00")), 3)  # LZMA
    refuse(patched(good, (CENTRAL, 20, struct.pack("<II", 1 << 30, 1 << 30))), 3)  # sizes beyond the file
    refuse(patched(good, (CENTRAL, 24, struct.pack("<I", 999))), 3)  # two sizes of a stored member
    refuse(patched(good, (CENTRAL, 42, struct.pack("<I", 0))), 3)  # two members at one place
    refuse(patched(good, (CENTRAL, 42, struct.pack("<I", 1 << 20))), 3)  # outside of the file


def test_zip_bombs(refuse: Refuse, tmp_path: Path) -> None:
    packed = archive({"x.npy": bytes(1 << 16)}, zipfile.ZIP_DEFLATED)
    claim = struct.pack("<I", 0xF0000000)
    assert "bomb" in str(refuse(patched(packed, (CENTRAL, 24, claim)), 3))
    # A member that says it is small and inflates to more: only what was said is ever inflated.
    bomb = patched(
        archive({"a/data.pkl": b"N" * (8 << 20)}, zipfile.ZIP_DEFLATED), (CENTRAL, 24, struct.pack("<I", 100))
    )
    refuse(bomb, 3)
    # Overlapping members (Fifield 2019) never reach inflation.
    kernel = archive({"a.npy": b"x" * 4096, "b.npy": b"y"}, zipfile.ZIP_DEFLATED)
    assert "overlap" in str(refuse(patched(kernel, (CENTRAL, 42, struct.pack("<I", 10))), 3))
    # gzip is recognised, not inflated.
    squeezer = zlib.compressobj(9, zlib.DEFLATED, 31)
    refuse(b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(64)) + squeezer.flush(), 4)
    refuse(b"\x1f\x8b\x08" + b"\xff" * 64, 3)


def test_many_members(refuse: Refuse) -> None:
    central = b"PK\x01\x02" + bytes(42)
    data = b"PK\x03\x04" + central * 200_000
    refuse(data + struct.pack("<4sHHHHIIH", END, 0, 0, 65535, 65535, len(central) * 200_000, 4, 0), 3)


def npy(header: str, payload: bytes = b"", version: int = 1) -> bytes:
    raw = header.encode()
    size = struct.pack("<H", len(raw)) if version == 1 else struct.pack("<I", len(raw))
    return b"\x93NUMPY" + bytes([version, 0]) + size + raw + payload


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': __import__('os').system('touch marker'), 'fortran_order': False, 'shape': (1,)}",
        "__import__('os').system('touch marker')",
        "(" * 9000,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1099511627776)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2.0,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 7}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 64 + ")}",
        "{'descr': '<f4', 'fortran_order': False}",
        "[]",
        "9" * 9000,
        "\x00",
    ],
)
def test_npy_headers(refuse: Refuse, header: str) -> None:
    refuse(npy(header, bytes(64)), 3)


def test_npy_lengths_and_types(refuse: Refuse) -> None:
    refuse(b"\x93NUMPY\x01\x00\xff\xff", 3)
    refuse(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99), 3)
    refuse(b"\x93NUMPY\x09\x00\x05\x00" + bytes(99), 3)
    form = "{{'descr': {}, 'fortran_order': False, 'shape': (4,)}}"
    for descr in ("'<f4'", "'|O'", "'<U99999'", "[('a', '<f4')]", "'V9'", "None", "'f3'"):
        refuse(npy(form.format(descr), b"\x80\x02"), 3, 4)


def st_file(header: Any, body: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def entry(shape: Any = (2,), start: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 31) + b'{"a":1}',
        struct.pack("<Q", 90) + b'{"a":1}',
        st_file({"x": entry(), "y": entry(start=4, end=12)}),
        st_file({"x": entry(end=80, shape=[20])}),
        st_file({"x": entry(start=-8, end=0)}),
        st_file({"x": entry(start=8, end=0)}),
        st_file({"x": entry(start=0.0, end=8.0)}),
        st_file({"x": entry(start=True, end=8)}),
        st_file({"x": entry(shape=[3])}),
        st_file({"x": entry(shape=[-2])}),
        st_file({"x": entry(shape=[1 << 62, 1 << 62])}),
        st_file({"x": entry(shape="ab")}),
        st_file({"x": entry(dtype="F128")}),
        st_file({"x": entry(dtype=["F32"])}),
        st_file({"x": []}),
        st_file({"x": {"dtype": "F32"}}),
        st_file({"__metadata__": {"a": 1}}),
        st_file({"__metadata__": [1]}),
        st_file(b'{"x":1,"x":2}'),
        st_file(b'{"x":' + b"[" * 200_000 + b"}"),
        st_file(b'{"x":' + b"9" * 20_000 + b"}"),
        st_file(b'{"\xff\xfe":1}'),
        st_file(b'{"pvdconvert":1'),
    ],
)
def test_safetensors_headers(refuse: Refuse, data: bytes) -> None:
    refuse(data, 3)


@pytest.mark.parametrize(
    "text", ["{", '{"a":' * 50_000, "[" * 300_000, '{"a": NaN,}', "{" + '"a":1,' * 9, '"' + "x", "9" * 9000]
)
def test_json(refuse: Refuse, text: str) -> None:
    refuse(text.encode(), 3)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 5000])
def test_random_bytes_are_no_checkpoint(refuse: Refuse, size: int) -> None:
    for seed in range(20):
        refuse(random.Random(seed * 100 + size).randbytes(size), 3, 4)


def test_text_is_no_checkpoint(refuse: Refuse) -> None:
    assert "not a checkpoint" in str(refuse(b"near = 2\nfar = 6\n", 3))


@cache
def sound() -> dict[str, bytes]:
    """A sound file of each container, small."""
    import tempfile

    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        torch_zip_writer.write(at / "zip", {"epoch": 1, "model": {"w": x, "b": x[0]}, "names": ["a", ("b", None)]})
        safetensors.write(at / "safetensors", {"w": ArrayTensor(x)}, {"pvdconvert": '{"version": 1}'})
        items = np.empty(4, object)
        items[:] = [x, x[0], x.T, x[:, 0]]
        with (at / "npy").open("wb") as file:
            np.save(file, items, allow_pickle=True)
        with (at / "npz").open("wb") as file:
            np.savez_compressed(file, x=x, y=np.array("SH9"))
        out = {p.name: p.read_bytes() for p in at.iterdir()}
    pid = pickle.dumps({"x": 1}, 2)
    out["legacy"] = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})) + pid
    out["legacy"] += pickle.dumps([], 2)
    return out


def outcome(path: Path) -> int:
    """The exit code of reading and identifying ``path``; 0 if it is sound."""
    try:
        for tensor in open_manifest(path).tensors.values():
            assert tensor.numpy().shape == tensor.shape
        identify(path)
    except PvdError as error:
        return error.exit_code if "\n" not in str(error) else -1
    return 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    kind=st.sampled_from(["zip", "safetensors", "npy", "npz", "legacy"]),
    edits=st.lists(st.tuples(st.integers(0, 1 << 30), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 1 << 30)),
)
def test_mutations_never_crash(
    tmp_path: Path, audited: list[str], kind: str, edits: list[tuple[int, bytes]], cut: int | None
) -> None:
    data = bytearray(sound()[kind])
    for at, value in edits:
        at %= len(data)
        data[at : at + len(value)] = value
    if cut is not None:
        data = data[: cut % len(data)]
    path = tmp_path / "mutant"
    path.write_bytes(bytes(data))
    audited.clear()
    assert outcome(path) in (0, 3, 4, 8)
    assert audited == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.binary(max_size=200))
def test_any_opcodes_end_in_an_error_or_a_value(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "opcodes"
    path.write_bytes(b"\x80\x02" + body + b".")
    assert outcome(path) in (0, 3, 4, 8)
