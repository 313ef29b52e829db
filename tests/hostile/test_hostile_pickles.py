"""Pickles that attack: in torch zips, legacy streams, npy files and bare. Each is assembled opcode by opcode."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvdconvert.containers import open_manifest
from pvdconvert.containers import pickle as reader
from pvdconvert.containers.torch_files import LEGACY_MAGIC
from pvdconvert.errors import InputError

Refuse = Callable[..., Any]


def name(module: str, function: str) -> bytes:
    return f"c{module}\n{function}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    return b"\x8a" + bytes([9]) + value.to_bytes(9, "little", signed=True)


def torch_zip(body: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + body + b".")
        for key, raw in (storages or {}).items():
            archive.writestr(f"a/data/{key}", raw)
        archive.writestr("a/version", "3\n")
    return out.getvalue()


def bare(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def legacy(body: bytes) -> bytes:
    parts = [pickle.dumps(v, 2) for v in (LEGACY_MAGIC, 1001, {"little_endian": True})]
    return b"".join(parts) + b"\x80\x02" + body + b"." + pickle.dumps([], 2)


def npy(body: bytes) -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x80\x02" + body + b"."


CONTAINERS = pytest.mark.parametrize("container", [torch_zip, bare, legacy, npy])
TOUCH = "touch marker"
SYSTEM = name("posix", "system")


def attacks() -> dict[str, bytes]:
    """Payloads that run a command in Python's own unpickler."""
    run = text(TOUCH)
    good = b"}(" + text("epoch") + b"K\x01"
    return {
        "reduce": SYSTEM + run + b"\x85R",
        "os": name("os", "system") + run + b"\x85R",
        "nt": name("nt", "system") + run + b"\x85R",
        "popen": name("subprocess", "Popen") + run + b"\x85R",
        "eval": name("builtins", "eval") + run + b"\x85R",
        "eval of python 2": name("__builtin__", "eval") + run + b"\x85R",
        "exec": name("builtins", "exec") + run + b"\x85R",
        "import": name("builtins", "__import__") + text("os") + b"\x85R",
        "open": name("builtins", "open") + text("marker") + text("w") + b"\x86R",
        "inst": b"(" + run + b"iposix\nsystem\n",
        "obj": b"(" + SYSTEM + run + b"o",
        "newobj": SYSTEM + run + b"\x85\x81",
        "newobj_ex": SYSTEM + run + b"\x85}\x92",
        "stack_global": text("os") + text("system") + b"\x93" + run + b"\x85R",
        "dotted": text("torch") + text("serialization.os.system") + b"\x93" + run + b"\x85R",
        "in a dict": good + text("x") + SYSTEM + run + b"\x85Ru",
        "in a list": b"](" + SYSTEM + run + b"\x85Re",
        "rebuild": name("torch._tensor", "_rebuild_from_type_v2") + b"(" + SYSTEM + b"N" + run + b"\x85NtR",
        "copyreg": name("copyreg", "__newobj__") + b"(" + SYSTEM + run + b"tR",
        "reconstructor": name("copyreg", "_reconstructor") + b"(" + SYSTEM + b"NNtR",
        "runpy": name("runpy", "_run_code") + run + b"\x85R",
        "unpacked": name("shutil", "rmtree") + text("/nowhere") + b"\x85R",
    }


@CONTAINERS
@pytest.mark.parametrize("attack", attacks())
def test_calls_are_refused(refuse: Refuse, container: Callable[[bytes], bytes], attack: str) -> None:
    error = refuse(container(attacks()[attack]), 8)
    assert "nothing was run" in str(error)


def inert() -> dict[str, bytes]:
    """Indirect payloads: stubs here, and a program instead of a checkpoint."""
    run = text(TOUCH)
    getattr_ = name("builtins", "getattr")
    return {
        "getattr": getattr_ + name("torch", "os") + text("system") + b"\x86R" + run + b"\x85R",
        "partial": name("functools", "partial") + SYSTEM + run + b"\x86R)R",
        "attrgetter": name("operator", "attrgetter") + text("system") + b"\x85R" + name("torch", "os") + b"\x85R",
        "setstate": name("torch.nn", "Linear") + b")\x81}(" + text("__setstate__") + SYSTEM + text("x") + run + b"ub",
        "loads": name("pickle", "loads") + text("x") + b"\x85R",
        "torch.load": name("torch", "load") + text("x") + b"\x85R",
        "load_from_bytes": name("torch.storage", "_load_from_bytes") + b"C\x02ab\x85R",
    }


@pytest.mark.parametrize("attack", inert())
@pytest.mark.parametrize("container", [torch_zip, bare, legacy, npy])
def test_indirect_calls_stay_names(refuse: Refuse, container: Callable[[bytes], bytes], attack: str) -> None:
    refuse(container(inert()[attack]), 3 if container is npy else 8)


def test_the_marker_would_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The payloads are real: Python's own unpickler runs them."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(bare(attacks()["reduce"]))
    assert (tmp_path / "marker").exists()


def test_unknown_names_in_a_fine_checkpoint_do_not_refuse_it(tmp_path: Path) -> None:
    body = b"}(" + text("hparams") + name("some.project", "Config") + b")\x81}(" + text("lr") + b"K\x01ub"
    body += text("f") + name("os", "system")  # named, but not called
    body += text("w") + tensor() + b"u"
    (tmp_path / "a.pt").write_bytes(torch_zip(body, {"0": bytes(24)}))
    m = open_manifest(tmp_path / "a.pt")
    assert m.tensors["w"].shape == (2, 3)
    assert repr(m.tree["hparams"]) == "<some.project.Config>"
    assert m.tree["hparams"].state == {"lr": 1}


DOUBLED = b")" + b"2\x86" * 200  # a tuple of itself twice, 200 times: 2^200 leaves


def malformed() -> dict[str, bytes]:
    deep = b"]" * 30_000 + b"a" * 29_999
    encode_again = name("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R"
    return {
        "nothing": b"",
        "empty stack": b"0",
        "no mark": b"t",
        "tuple of nothing": b"\x87",
        "missing memo": b"h\x07",
        "huge memo": b"Nr\xff\xff\xff\x7f0j\xff\xff\xff\x6f",
        "huge text": b"X\xff\xff\xff\xffabc",
        "huge text 8": b"\x8d" + b"\xff" * 8,
        "huge bytes": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f",
        "huge bytearray": b"\x96\xff\xff\xff\xff\xff\x00\x00\x00",
        "huge integer": b"\x8b\xff\xff\xff\x7f",
        "negative integer": b"\x8b\xff\xff\xff\xff",
        "wide integer": b"\x8b\x00\x00\x01\x00" + b"\x7f" * 65536,
        "wide decimal": b"I" + b"9" * 60_000 + b"\n",
        "endless line": b"c" + b"x" * 10_000,
        "unknown opcode": b"\xfe",
        "extension": b"\x82\x01",
        "buffer": b"\x97",
        "frame": b"\x95" + b"\xff" * 8,
        "foreign persistent id": text("x") + b"Q",
        "many operations": b"N0" * 600_000,
        "many operations 2": b"](" + b"N" * 1_100_000 + b"e",
        "deep": deep,
        "deep tuples": b")" + b"\x85" * 60_000,
        "cycle": b"]q\x00h\x00a",
        "cycle of two": b"]q\x00(h\x00h\x00e",
        "cyclic dict": b"}q\x00(" + text("a") + b"h\x00" + text("b") + b"h\x00u",
        "doubling": DOUBLED,
        "billion laughs": b"](" + b"N" * 10 + b"e" + (b"q\x00](" + b"h\x00" * 10 + b"e") * 9,
        "odd items": b"}(Nu",
        "items of a number": b"K\x01(NNu",
        "append to a number": b"K\x01Na",
        "call a number": b"K\x01)R",
        "call without a tuple": name("a", "b") + b"K\x01R",
        "bad text": b"X\x02\x00\x00\x00\xff\xff",
        "wrong arguments": name("torch._utils", "_rebuild_tensor_v2") + b")R",
        "wrong encoding": name("_codecs", "encode") + text("x") + text("rot13") + b"\x86R",
        "amplified": text("x" * 60_000) + b"q\x000](" + encode_again * 4000 + b"e",
        "array without bytes": name("numpy.core.multiarray", "_reconstruct") + b"NNN\x87R(K\x01K\x05\x85"
        + name("numpy", "dtype") + text("f4") + b"\x85R\x89" + text("abc") + b"tb",
        "array of objects, too few": name("numpy.core.multiarray", "_reconstruct") + b"NNN\x87R(K\x01K\x05\x85"
        + name("numpy", "dtype") + text("O8") + b"\x85R\x89]tb",
    }  # fmt: skip


@pytest.mark.parametrize("case", malformed())
@pytest.mark.parametrize("container", [torch_zip, legacy])
def test_malformed(refuse: Refuse, container: Callable[[bytes], bytes], case: str) -> None:
    refuse(container(malformed()[case]), 3, 4)


def test_deep_recursion_of_known_functions(refuse: Refuse) -> None:
    """_rebuild_from_type_v2 of itself, thousands deep: a handler that calls handlers must not exhaust the stack."""
    f = name("torch._tensor", "_rebuild_from_type_v2")
    body = f + b"q\x000(NNNNt" + b"q\x010" + b"".join(b"(h\x00Nh\x01Ntq\x010" for _ in range(5000)) + b"h\x00h\x01R"
    refuse(torch_zip(body), 3)


# ------------------------------------------------------------------------------------------------- tensors


def tensor(
    shape: bytes = b"K\x02K\x03\x86",
    stride: bytes = b"K\x03K\x01\x86",
    offset: bytes = b"K\x00",
    numel: bytes = b"K\x06",
    kind: str = "FloatStorage",
    key: bytes = text("0"),
) -> bytes:
    pid = b"(" + text("storage") + name("torch", kind) + key + text("cpu") + numel + b"tQ"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + pid + offset + shape + stride + b"\x89NtR"


def test_the_template_is_a_valid_tensor(tmp_path: Path) -> None:
    raw = np.arange(6, dtype=np.float32)
    (tmp_path / "a.pt").write_bytes(torch_zip(b"}(" + text("w") + tensor() + b"u", {"0": raw.tobytes()}))
    np.testing.assert_array_equal(open_manifest(tmp_path / "a.pt").tensors["w"].numpy(), raw.reshape(2, 3))


TENSORS = {
    "huge by stride 0": tensor(whole(1 << 40) + b"\x85", b"K\x00\x85"),
    "huge product": tensor((whole(1 << 40) * 3) + b"\x87", b"K\x00K\x00K\x00\x87"),
    "beyond by shape": tensor(b"K\x02K\x04\x86"),
    "beyond by stride": tensor(stride=b"K\x04K\x01\x86"),
    "beyond by offset": tensor(offset=b"K\x01"),
    "empty beyond": tensor(b"K\x00\x85", b"K\x01\x85", offset=b"K\x07"),
    "overlapping": tensor(b"K\x06K\x06\x86", b"K\x00K\x01\x86"),
    "negative shape": tensor(whole(-2) + b"K\x03\x86"),
    "negative stride": tensor(stride=whole(-1) + b"K\x01\x86"),
    "negative offset": tensor(offset=whole(-1)),
    "rank mismatch": tensor(stride=b"K\x01\x85"),
    "float shape": tensor(b"G?\xf0\x00\x00\x00\x00\x00\x00\x85", b"K\x01\x85"),
    "bool shape": tensor(b"\x88\x85", b"K\x01\x85"),
    "text shape": tensor(text("ab"), text("ab")),
    "rank 40": tensor(b"(" + b"K\x01" * 40 + b"t", b"(" + b"K\x01" * 40 + b"t"),
    "storage too large": tensor(numel=whole(1 << 50)),
    "storage of negative size": tensor(numel=whole(-1)),
    "storage without size": tensor(numel=b"N"),
    "storage not there": tensor(key=text("1")),
    "storage outside": tensor(key=text("../../../etc/passwd")),
    "storage key is a number": tensor(key=b"K\x00"),
    "wider storage": tensor(kind="DoubleStorage"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_leave_their_storage(refuse: Refuse, case: str) -> None:
    refuse(torch_zip(b"}(" + text("w") + TENSORS[case] + b"u", {"0": bytes(24)}), 3)


def test_many_views_of_one_storage(refuse: Refuse) -> None:
    """20,000 tensors that each cover the same 64 KiB: 1.3 GB if anyone read them all."""
    size = b"M\x00\x40"  # 16384
    first = tensor(size + b"\x85", b"K\x01\x85", numel=size)
    pid = b"(" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + size + b"tQq\x05"
    again = name("torch._utils", "_rebuild_tensor_v2") + b"q\x060](" + first + b"0" + pid + b"0"
    again += (b"h\x06(h\x05K\x00" + size + b"\x85K\x01\x85\x89NtR") * 20_000 + b"e"
    error = refuse(torch_zip(again, {"0": bytes(1 << 16)}), 3)
    assert "claim far more" in str(error)


@pytest.mark.parametrize("count", [0, 5, 7, 1 << 40])
def test_legacy_storage_of_another_size(refuse: Refuse, count: int) -> None:
    pid = b"((" + text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x06NtQ"
    body = name("torch._utils", "_rebuild_tensor_v2") + pid + b"K\x00K\x06\x85K\x01\x85\x89NtR"
    data = legacy(b"}(" + text("w") + body + b"u").removesuffix(pickle.dumps([], 2))
    refuse(data + pickle.dumps(["0"], 2) + struct.pack("<q", count) + bytes(24), 3)
    refuse(data + pickle.dumps([], 2), 3)
    refuse(data + pickle.dumps(["0", "1"], 2) + struct.pack("<q", 6) + bytes(24), 3)
    refuse(data + pickle.dumps(["0", "0"], 2) + struct.pack("<q", 6) + bytes(24), 3)


def test_a_key_that_takes_forever_to_hash_gets_a_name() -> None:
    value, _ = reader.load(memoryview(bare(b"}(" + DOUBLED + b"K\x07u")), "x")
    assert value == {"<tuple#1>": 7}


@pytest.mark.parametrize("case", ["huge memo", "huge text 8", "huge bytes", "amplified"])
def test_memory_stays_bounded(case: str) -> None:
    """A few bytes must not cost the half gigabyte that Python's own unpickler would allocate for them."""
    data = memoryview(bare(malformed()[case]))
    tracemalloc.start()
    with pytest.raises(InputError):
        reader.load(data, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 << 20
