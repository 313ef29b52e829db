"""Every hostile file through the real command line: one line, the documented exit code, soon, and in little memory."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest

from pvdconvert.cli.main import run
from pvdconvert.containers import torch_zip_writer
from tests.hostile import test_hostile_containers as containers
from tests.hostile import test_hostile_pickles as pickles
from tests.memory import PEAK

LIMIT = 500 << 20
"""Bytes of memory that refusing a file may take at its peak."""


def bomb(members: int = 1) -> bytes:
    """A gzip of 600 MB of zeros that begins as a msgpack map, in some 600 kB."""
    squeezer = zlib.compressobj(9, zlib.DEFLATED, 31)
    start = squeezer.compress(b"\x81\xa8snapshot" + bytes(54))
    once = start + b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(600)) + squeezer.flush()
    return once * members


def nested(depth: int) -> bytes:
    return b"\x81\xa1a" * depth + b"\xc0"


def npz_of(members: dict[str, bytes]) -> bytes:
    return containers.archive({f"{k}.npy": v for k, v in members.items()})


def hostile() -> Iterator[tuple[str, bytes, tuple[int, ...]]]:
    """(name, file, exit codes that may answer it)."""
    for name, body in pickles.attacks().items():
        for container in (pickles.torch_zip, pickles.bare, pickles.legacy, pickles.npy):
            yield f"{name} in {container.__name__}", container(body), (3, 4, 8)
    for name, body in pickles.malformed().items():
        yield f"{name} in a zip", pickles.torch_zip(body), (3, 4)
        yield f"{name} in a legacy stream", pickles.legacy(body), (3, 4)
    for name, body in pickles.TENSORS.items():
        yield f"tensor: {name}", pickles.torch_zip(b"}(" + pickles.text("w") + body + b"u", {"0": bytes(24)}), (3,)
    for name in ("../evil", "/etc/evil", "C:\\evil", "a/data/../../../x"):
        yield f"zip slip {name}", containers.archive({**containers.GOOD, name: b"x"}), (8,)
    packed = containers.archive({"x.npy": bytes(1 << 16)}, 8)
    yield "zip bomb", containers.patched(packed, (containers.CENTRAL, 24, struct.pack("<I", 0xF0000000))), (3,)
    yield "gzip bomb", bomb(), (3, 4)
    yield "gzip bombs in a row", bomb(3), (3, 4)
    yield "zlib bomb", zlib.compress(b"\x81\xa8snapshot" + bytes(300 << 20), 9), (3, 4)
    yield "gzip cut", gzip.compress(bytes(1000))[:-9], (3, 4)
    yield "msgpack, deep", nested(100_000), (3, 4)
    yield "msgpack, deep in gzip", gzip.compress(nested(100_000)), (3, 4)
    yield "msgpack, huge map", b"\x81\xa8snapshot\xdf\xff\xff\xff\xff", (3, 4)
    yield "msgpack, huge bytes", b"\x81\xa8snapshot\xc6\xff\xff\xff\xff\x00", (3, 4)
    yield "msgpack, huge text", b"\x81\xa8snapshot\xdb\xff\xff\xff\xff\x00", (3, 4)
    yield "msgpack, cut", msgpack.packb({"snapshot": {"params_binary": bytes(99)}})[:-50], (3, 4)
    for header in ("__import__('os').system('touch marker')", "(" * 9000, "9" * 9000, "[]", "\0",
                   "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1099511627776)}",
                   "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"):  # fmt: skip
        yield f"npy {header:.30}", containers.npy(header, bytes(64)), (3, 4)
        yield f"npz {header:.30}", npz_of({"links": containers.npy(header, bytes(64))}), (3, 4)
    for name, header_ in {
        "overlap": {"x": containers.entry(), "y": containers.entry(start=4, end=12)},
        "beyond": {"x": containers.entry(end=80, shape=[20])},
        "huge": {"x": containers.entry(shape=[1 << 62, 1 << 62])},
        "negative": {"x": containers.entry(shape=[-2])},
    }.items():
        yield f"safetensors, {name}", containers.st_file(header_), (3,)
    yield "safetensors, deep", containers.st_file(b'{"x":' + b"[" * 200_000 + b"}"), (3,)
    deep = json.dumps({"pvdconvert": '{"version":1,"architecture":"nerf","config":' + "[" * 100_000}).encode()
    yield "own header, deep", containers.st_file(b'{"__metadata__":' + deep + b"}", b""), (3,)
    yield "json, deep", b"[" * 300_000, (3,)
    yield "nothing but zeros", bytes(4096), (3, 4)


CASES = {name: (data, codes) for name, data, codes in hostile()}


def test_there_are_many() -> None:
    assert len(CASES) > 150


def judged(code: int, out: str, err: str, codes: tuple[int, ...]) -> None:
    """One line on stderr. What inspect shows of a well-formed stranger goes to stdout and names no code of ours."""
    assert code in codes, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("pvdconvert: error: ")
    assert len(lines[0]) < 1000
    assert "internal error" not in lines[0]
    assert "Traceback" not in out + err


@pytest.mark.parametrize("name", CASES)
def test_the_command_line_refuses_it(
    tmp_path: Path, audited: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data, codes = CASES[name]
    (tmp_path / "hostile.bin").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    audited.clear()
    code = run(["inspect", "hostile.bin"])
    assert [e for e in audited if "'hostile" in e or not e.startswith("open")] == []
    told = capsys.readouterr()
    judged(code, told.out, told.err, codes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hostile.bin"]


MEASURED = f"""{PEAK}
from pvdconvert.cli.main import run
code = run(sys.argv[1:])
sys.stderr.flush()
print(peak())
sys.exit(code)
"""
SAMPLE = ["reduce in torch_zip", "huge memo in a zip", "doubling in a legacy stream", "tensor: huge by stride 0",
          "zip bomb", "gzip bomb", "zlib bomb", "msgpack, deep in gzip", "msgpack, huge bytes", "json, deep",
          "safetensors, deep", "amplified in a zip"]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("command", [["inspect"], ["convert", "--to", "nerf"]], ids=["inspect", "convert"])
def test_as_a_process_in_little_memory(tmp_path: Path, command: list[str], name: str) -> None:
    data, codes = CASES[name]
    (tmp_path / "hostile.bin").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURED, command[0], "hostile.bin", *command[1:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    *out, peak = done.stdout.splitlines()
    judged(done.returncode, "\n".join(out), done.stderr, codes)
    assert int(peak) < LIMIT
    assert [p.name for p in tmp_path.iterdir()] == ["hostile.bin"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], repo: Path, value: float
) -> None:
    from pvdconvert.containers import open_manifest

    tree = open_manifest(repo / "examples" / "ngp.ckpt").tree
    model = {k: np.array(t.numpy()) for k, t in tree["model"].items()}
    model["sigma_net.0.weight"][3, 1] = value
    torch_zip_writer.write(tmp_path / "bad.pth", {"model": model})
    code = run(["convert", str(tmp_path / "bad.pth"), "--to", "nerf", "-o", str(tmp_path / "o.safetensors"), "-q"])
    told = capsys.readouterr().err
    assert code == 10
    assert "tensor 'sigma_net.0.weight' holds NaN or infinity" in told
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pth"]


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.9, 0.999])
def test_cut_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], repo: Path, keep: float) -> None:
    data = (repo / "examples" / "ngp.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: int(keep * len(data))])
    code = run(["inspect", str(tmp_path / "cut.ckpt")])
    told = capsys.readouterr()
    judged(code, told.out, told.err, (3,))


def object_array(items: list[object]) -> bytes:
    out, boxed = io.BytesIO(), np.empty(len(items), object)
    boxed[:] = items
    np.save(out, boxed, allow_pickle=True)
    return out.getvalue()


COUNTS: dict[str, Callable[[], bytes]] = {
    "kernels without a bias": lambda: object_array([np.zeros((63, 8), np.float32)] * 5),
    "no arrays": lambda: object_array([1, 2, 3, 4]),
    "empty": lambda: object_array([]),
}


@pytest.mark.parametrize("name", COUNTS)
def test_wrong_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "model_1.npy").write_bytes(COUNTS[name]())
    code = run(["inspect", str(tmp_path / "model_1.npy")])
    told = capsys.readouterr()
    judged(code, told.out, told.err, (3, 4))
