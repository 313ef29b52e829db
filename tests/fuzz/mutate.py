"""Mutations of checkpoints that keep their structure: names, shapes, types, counts, headers; and bytes. No torch.

A seed is decoded once into plain dicts, lists, scalars and numpy arrays. A mutation changes a copy of that tree and
writes it in a container again, or changes the bytes of the file. Deterministic in the generator that is passed in.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

from pvdconvert.containers import Manifest, Stub, torch_zip_writer
from pvdconvert.containers.values import Array
from pvdconvert.plugin import LazyTensor

NUMBERS: tuple[Any, ...] = (0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 65535, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 40,
                            1 << 62, 1 << 70, 0.0, -0.0, 0.5, 1e-30, 1e30, -1e30, 1e300, math.nan, math.inf,
                            -math.inf, True, False, None)  # fmt: skip
TEXTS = ("", "x", "0", "none", "relu", "\0", "a" * 300, "nan", "-1", "../x", "ndc", "é", "[]", "{}", "model", "weight")
DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
MAX_ARRAY = 1 << 16
Tree = Any


def plain(value: Any) -> Tree:
    """A manifest's tree as dicts, lists, tuples, scalars and arrays; what cannot be written again becomes text."""
    if isinstance(value, Array):
        value = value.tensor if value.tensor is not None else list(value.items or [])
    if isinstance(value, Stub):
        value = value.entries or value.items or repr(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if isinstance(k, (str, int, bytes))}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value) if type(value) in (list, tuple) else list(map(plain, value))
    if hasattr(value, "numpy") and hasattr(value, "dtype"):
        return np.array(value.numpy())
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    return str(value)


def change(rng: random.Random, tree: Tree) -> Tree:
    """``tree`` with one to three changes; parts that did not change are shared."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        tree = _change(rng, tree)
    return tree


def _change(rng: random.Random, node: Tree) -> Tree:
    """One change somewhere below ``node``: a copy along the way to it."""
    if isinstance(node, dict) and node:
        if rng.random() < 0.25:
            return _change_keys(rng, node)
        key = rng.choice(list(node))
        return {**node, key: _change(rng, node[key])}
    if isinstance(node, msgpack.ExtType):
        return _extension(rng, node)
    if isinstance(node, (list, tuple)) and node:
        items = list(node)
        if rng.random() < 0.25:
            at = rng.randrange(len(items))
            action = rng.randrange(4)
            if action == 0:
                del items[at]
            elif action == 1:
                items.insert(at, rng.choice(items))
            elif action == 2:
                rng.shuffle(items)
            else:
                items[at] = _scalar(rng, items[at])
        else:
            at = rng.randrange(len(items))
            items[at] = _change(rng, items[at])
        return type(node)(items)
    if isinstance(node, np.ndarray):
        return _array(rng, node)
    return _scalar(rng, node)


def _extension(rng: random.Random, node: msgpack.ExtType) -> Any:
    """flax packs an array as an extension that holds [shape, dtype, bytes] in msgpack again."""
    action = rng.randrange(6)
    if action == 0:
        return msgpack.ExtType(rng.choice((0, 1, 2, 3, 127)), node.data)
    if action == 1:
        return msgpack.ExtType(node.code, flip(rng, node.data))
    try:
        return msgpack.ExtType(node.code, packed(_change(rng, msgpack.unpackb(node.data, strict_map_key=False))))
    except ValueError:
        return None


def _change_keys(rng: random.Random, node: dict[Any, Any]) -> dict[Any, Any]:
    out, keys = dict(node), list(node)
    key, other = rng.choice(keys), rng.choice(keys)
    action = rng.randrange(5)
    if action == 0:
        del out[key]
    elif action == 1:
        out[_name(rng, key)] = out.pop(key)
    elif action == 2:
        out[key], out[other] = out[other], out[key]
    elif action == 3:
        out[_name(rng, key)] = out[key]
    else:
        out[key] = rng.choice((None, {}, [], "text", 1, 2.5, {"a": 1}, [1, 2], out[other]))
    return out


def _name(rng: random.Random, key: Any) -> Any:
    if not isinstance(key, str) or not key:
        return rng.choice(TEXTS)
    words = key.split(".")
    action = rng.randrange(6)
    if action == 0:
        at = rng.randrange(len(key))
        return key[:at] + rng.choice("_.0a9") + key[at + 1 :]
    if action == 1:
        digits = [k for k, w in enumerate(words) if w.isdigit()]
        if digits:
            words[rng.choice(digits)] = rng.choice(("0", "1", "2", "9", "99", "-1", "00", "1000000", "\u0663"))
            return ".".join(words)
        return key + ".0"
    if action == 2:
        return ".".join(words[:-1]) or "x"
    if action == 3:
        return f"{key}.{rng.choice(('weight', 'bias', 'grid', 'x'))}"
    if action == 4:
        return key.upper()
    return key + rng.choice(("_", "2", " ", ".weight"))


def _scalar(rng: random.Random, node: Any) -> Any:
    action = rng.random()
    if isinstance(node, bool):
        return rng.choice((not node, None, 0, 2, "true"))
    if isinstance(node, int) and action < 0.5:
        return rng.choice((node + 1, node - 1, node * 2, -node, node * 1000003, node // 2, float(node)))
    if isinstance(node, float) and action < 0.5:
        return rng.choice((-node, node * 2, node * 1e20, node / 3, str(node), math.nan))
    if isinstance(node, str) and action < 0.7:
        if node and rng.random() < 0.6:
            at = rng.randrange(len(node))
            return node[:at] + rng.choice(("", "0", "X", "9", "-")) + node[at + 1 :]
        return rng.choice(TEXTS)
    if isinstance(node, bytes) and node:
        return rng.choice((node[: rng.randrange(len(node))], node + bytes(rng.randrange(16)), b"", flip(rng, node)))
    return rng.choice(NUMBERS) if action < 0.85 else rng.choice((*TEXTS, [], {}, [0.0] * 3))


def _array(rng: random.Random, a: np.ndarray[Any, Any]) -> Any:
    """Another shape, another type, or other values."""
    action = rng.randrange(12)
    with np.errstate(all="ignore"):
        if action == 0 and a.ndim:
            axis = rng.randrange(a.ndim)
            return a.take(range(max(0, a.shape[axis] - rng.choice((1, 1, 2, a.shape[axis])))), axis)
        if action == 1 and a.ndim and 0 < a.size <= MAX_ARRAY:
            axis = rng.randrange(a.ndim)
            return np.concatenate([a, a[tuple(slice(0, 1) if k == axis else slice(None) for k in range(a.ndim))]], axis)
        if action == 2:
            return np.ascontiguousarray(a.T)
        if action == 3:
            return a.reshape(-1)
        if action == 4:
            return a[None] if rng.random() < 0.5 or not a.ndim else a[..., None]
        if action == 5 and a.ndim and a.shape[0]:
            return a[0]
        if action in (6, 7):
            return np.nan_to_num(a, nan=0.0).astype(rng.choice(DTYPES)) if a.dtype.kind in "fiub" else a
        if action == 8:
            return rng.choice((np.zeros((), a.dtype), np.zeros((0,), a.dtype), np.zeros((0, 3), a.dtype), None, 1.0))
        if a.size == 0 or a.dtype.kind not in "fiub":
            return None
        out = a.copy()
        flat = out.reshape(-1)
        kind = a.dtype.kind
        info = None if kind in "bf" else np.iinfo(a.dtype)
        extremes = (np.nan, np.inf, -np.inf, 1e38, -1e38, 0.0) if info is None else (info.min, info.max, 0, 1)
        if action == 9:
            flat[:] = rng.choice(extremes)
        else:
            flat[rng.randrange(flat.size)] = rng.choice(extremes)
        return out


def flip(rng: random.Random, data: bytes) -> bytes:
    """``data`` with a few bytes changed, cut, doubled or overwritten by a number."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if not out:
            break
        # Headers and directories lie at both ends.
        span = rng.choice((16, 64, 64, 512, 4096, len(out)))
        at = rng.randrange(min(span, len(out)))
        at = len(out) - 1 - at if rng.random() < 0.3 else at
        action = rng.randrange(6)
        if action < 2:
            out[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif action == 3:
            out[at : at + 8] = struct.pack("<q", rng.choice((0, -1, 1 << 31, 1 << 40, (1 << 63) - 1, 255)))
        elif action == 4:
            out[at : at + rng.randrange(1, 9)] = b""
        else:
            out[at:at] = out[at : at + rng.randrange(1, 33)]
    if rng.random() < 0.15:
        del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


# ------------------------------------------------------------------------------------------------ containers again


def zipped(members: list[tuple[str, bytes]]) -> bytes:
    """A stored zip archive, its checksums left out: our reader does not ask for them."""
    parts: list[bytes] = []
    central: list[bytes] = []
    at = 0
    for name, raw in members:
        label = name.encode()
        local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 33, 0, len(raw), len(raw), len(label), 0)
        central.append(
            struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, len(raw), len(raw), len(label),
                        0, 0, 0, 0, 0, at) + label
        )  # fmt: skip
        parts += [local, label, raw]
        at += len(local) + len(label) + len(raw)
    directory = b"".join(central)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, len(members), len(members), len(directory), at, 0)
    return b"".join([*parts, directory, end])


def torch_zip(tree: Tree) -> bytes:
    arrays: list[np.ndarray[Any, Any]] = []
    text = b"\x80\x02" + b"".join(torch_zip_writer._pickle(_writable(tree), arrays)) + b"."
    members = [
        ("a/data.pkl", text),
        *((f"a/data/{k}", np.ascontiguousarray(v).tobytes()) for k, v in enumerate(arrays)),
    ]
    return zipped([*members, ("a/version", b"3\n")])


def _writable(tree: Tree) -> Tree:
    """``tree`` without what torch files cannot hold."""
    if isinstance(tree, np.generic):
        tree = tree.item()
    if isinstance(tree, dict):
        return {k if isinstance(k, (str, int)) else str(k): _writable(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_writable(v) for v in tree)
    if isinstance(tree, bytes):
        return tree.decode("latin1")
    if isinstance(tree, np.ndarray) and str(tree.dtype) not in torch_zip_writer._STORAGES:
        return str(tree.dtype)
    if isinstance(tree, int) and not isinstance(tree, bool) and abs(tree) >= 1 << 200:
        return 1 << 70
    return tree


def _npy(array: Any) -> bytes:
    out = io.BytesIO()
    if isinstance(array, list):
        boxed = np.empty(len(array), object)
        boxed[:] = array
        array = boxed
    try:
        np.lib.format.write_array(out, np.asarray(array), allow_pickle=True)
    except (ValueError, OverflowError):
        np.lib.format.write_array(out, np.zeros(0))
    return out.getvalue()


def npy(tree: Tree) -> bytes:
    return _npy(tree if isinstance(tree, (list, np.ndarray)) else [tree])


def npz(tree: Tree) -> bytes:
    items = tree.items() if isinstance(tree, dict) else [("x", tree)]
    return zipped([(f"{str(k).replace('..', '')}.npy", _npy(v)) for k, v in items if not isinstance(v, (dict, list))])


def safetensors(tree: Tree) -> bytes:
    """Of {"tensors": {name: array}, "meta": {key: text or JSON}}."""
    header: dict[str, Any] = {}
    body: list[bytes] = []
    at = 0
    kinds = {"float32": "F32", "float16": "F16", "float64": "F64", "int64": "I64", "int32": "I32", "int16": "I16",
             "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip
    tensors = tree.get("tensors") if isinstance(tree, dict) else None
    for name, array in tensors.items() if isinstance(tensors, dict) else ():
        if isinstance(array, np.ndarray) and str(array.dtype) in kinds:
            raw = np.ascontiguousarray(array).tobytes()
            header[str(name)] = {"dtype": kinds[str(array.dtype)], "shape": list(array.shape),
                                 "data_offsets": [at, at + len(raw)]}  # fmt: skip
            body.append(raw)
            at += len(raw)
        else:
            header[str(name)] = array if isinstance(array, (dict, list, str, int)) else None
    meta = tree.get("meta") if isinstance(tree, dict) else None
    if isinstance(meta, dict):
        header["__metadata__"] = {
            str(k): v if isinstance(v, str) else json.dumps(v, default=str) for k, v in meta.items()
        }
    text = json.dumps(header, default=str).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + b"".join(body)


def packed(tree: Tree) -> bytes:
    try:
        return bytes(msgpack.packb(tree, default=str))
    except (OverflowError, ValueError, TypeError):
        return bytes(msgpack.packb({"snapshot": str(tree)[:100]}))


def decode(kind: str, manifest: Manifest, data: bytes) -> tuple[Tree, Callable[[Tree], bytes]] | None:
    """(the seed's tree, what writes such a tree again), or None for containers that are only changed bytewise."""
    if kind in ("torch-zip", "torch-legacy", "pickle"):
        return plain(manifest.tree), torch_zip
    if kind == "npz":
        return plain(manifest.tree), npz
    if kind == "npy":
        return plain(manifest.tree), npy
    if kind == "safetensors":
        meta = {k: _json(v) for k, v in manifest.meta.items()}
        tensors: dict[str, LazyTensor] = dict(manifest.tensors)
        return {"tensors": plain(tensors), "meta": meta}, safetensors
    if kind == "msgpack":
        return msgpack.unpackb(data, strict_map_key=False), packed
    if kind == "gzip" and isinstance(manifest.tree, dict):
        tree = msgpack.unpackb(gzip.decompress(data), strict_map_key=False)
        return tree, lambda tree: gzip.compress(packed(tree), 1, mtime=0)
    return None


def _json(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text
