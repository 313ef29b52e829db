"""What a file holds, without knowing any format: container kind, value tree, lazy tensors, siblings. No torch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pvdconvert.containers import arrays, inflate, msgpack, pickle, safetensors, torch_files
from pvdconvert.containers.archive import Archive
from pvdconvert.containers.mapped import map_file
from pvdconvert.containers.msgpack import JoinedTensor
from pvdconvert.containers.values import Array, RawTensor, StridedTensor, Stub
from pvdconvert.errors import InputError, PvdError, UnsafeError
from pvdconvert.plugin import LazyTensor

MAX_NODES = 250_000
MAX_DEPTH = 48
MAX_CHILDREN = 64
MAX_LISTED = 4096
MAX_TEXT = 64 << 20
MAX_JSON = 16 << 20
CHECKPOINTS = frozenset(
    {"torch-zip", "torch-legacy", "npy", "npz", "safetensors", "msgpack", "gzip", "zlib", "pickle", "zip"}
)
"""Kinds that can hold weights: a folder's children of other kinds are left alone."""
_PACKED = ("msgpack", "gzip", "zlib")


@dataclass(frozen=True)
class Manifest:
    """A decoded file or folder.

    kind      "torch-zip", "torch-legacy", "npy", "npz", "safetensors", "json", "pickle", "msgpack", "gzip", "zlib",
              "zip", "folder" or "unknown". "gzip" and "zlib" have the tree of the msgpack or json that they wrap, or
              none
    tree      inert nested dicts, lists, scalars, :class:`Stub`; tensors are LazyTensor leaves
    tensors   every LazyTensor of the tree by its path, "model.encoder.embeddings"
    meta      scalars of the tree by path: JSON values
    children  of a folder: manifests of the checkpoint files in it
    problems  of a folder: the files in it that could not be opened, with the error
    """

    path: Path
    kind: str
    size: int
    tree: Any = None
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    children: tuple[Manifest, ...] = ()
    problems: tuple[tuple[str, PvdError], ...] = ()

    @property
    def folder(self) -> Path:
        return self.path if self.kind == "folder" else self.path.absolute().parent

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(sorted(p.name for p in _files(self.folder)))

    def siblings(self) -> tuple[str, ...]:
        """Names of the regular files in the same folder (at most 4096), sorted."""
        return self._names

    def open_sibling(self, name: str) -> Manifest:
        """The manifest of the file ``name`` in the same folder. Raises InputError if there is none."""
        return open_manifest(self._sibling(name))

    def sibling_text(self, name: str, limit: int = 1 << 18) -> str:
        """The text of sibling ``name``. Raises InputError where it is missing, not UTF-8, or beyond ``limit`` bytes."""
        path = self._sibling(name)
        try:
            with path.open("rb") as file:
                raw = file.read(limit + 1)
            if len(raw) > limit:
                raise InputError(f"{path}: more than {limit} bytes: not the settings of a checkpoint")
            return raw.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text: {error}") from error

    def sha256(self) -> str:
        """Hex digest of the file's bytes; of a folder: of its children's names and digests."""
        digest = hashlib.sha256()
        if self.kind == "folder":
            for child in self.children:
                digest.update(f"{child.path.name}\0{child.sha256()}\n".encode())
        else:
            with self.path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def _sibling(self, name: str) -> Path:
        if name not in self._names:
            raise InputError(f"{self.folder / name}: no such file beside the checkpoint")
        return self.folder / name


def open_manifest(path: Path) -> Manifest:
    """Decode ``path``, a file or a folder, by its content. Nothing in it is run; tensors are not read.

    Raises InputError (missing, empty, truncated, corrupt, beyond the bounds) or UnsafeError (holds code, not numbers).
    """
    path = Path(path)
    return _open_folder(path) if path.is_dir() else _open_file(path)


def open_bytes(data: bytes | memoryview, path: Path) -> Manifest:
    """Decode ``data`` as the file ``path`` would be; ``path`` names it in errors and need not exist.

    Raises as :func:`open_manifest` does.
    """
    return _decode(memoryview(data), path)


def _files(folder: Path) -> Iterator[Path]:
    """Regular files directly in ``folder``, by name; links are not followed."""
    try:
        entries = sorted(folder.iterdir())[:MAX_LISTED]
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from error
    return (p for p in entries if p.is_file() and not p.is_symlink())


def _open_folder(path: Path) -> Manifest:
    inner = sorted(p for p in path.iterdir() if p.is_dir() and not p.is_symlink())[:MAX_CHILDREN]
    children: list[Manifest] = []
    problems: list[tuple[str, PvdError]] = []
    for folder in (path, *inner):
        for file in _files(folder):
            if len(children) >= MAX_CHILDREN:
                break
            if _sniff_file(file) in CHECKPOINTS:
                try:
                    child = _open_file(file)
                    children += [child] if child.kind != "zip" else []
                except PvdError as error:
                    problems.append((str(file.relative_to(path)), error))
    return Manifest(path, "folder", sum(c.size for c in children), None, {}, {}, tuple(children), tuple(problems))


def _sniff_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return sniff(memoryview(file.read(64)))
    except OSError:
        return "unknown"


def sniff(data: memoryview) -> str:
    """The kind of container that ``data`` begins as (layouts section 0.1)."""
    head = bytes(data[:64])
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip"
    if head.startswith(torch_files.LEGACY_START[:14]):
        return "torch-legacy"
    if head.startswith(arrays.NPY_MAGIC):
        return "npy"
    if safetensors.looks_like(data):
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head[:3] == b"\x1f\x8b\x08":
        return "gzip"
    if inflate.looks_like_zlib(head):
        return "zlib"
    if head.lstrip(b" \t\r\n")[:1] in (b"{", b"["):
        return "json"
    if _begins_msgpack_map(head):
        return "msgpack"
    return "unknown"


def _begins_msgpack_map(head: bytes) -> bool:
    """A map whose first key is a short printable string."""
    if not head or not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return False
    at = {0xDE: 3, 0xDF: 5}.get(head[0], 1)
    if at + 1 >= len(head) or not (0xA1 <= head[at] <= 0xBF or head[at] == 0xD9):
        return False
    start, size = (at + 2, head[at + 1]) if head[at] == 0xD9 else (at + 1, head[at] & 0x1F)
    key = head[start : start + size]
    return len(key) > 0 and all(0x20 <= b < 0x7F for b in key)


def _open_file(path: Path) -> Manifest:
    return _decode(map_file(path), path)


def _decode(data: memoryview, path: Path) -> Manifest:
    where, kind, size = str(path), sniff(data), len(data)
    tree: Any = None
    if kind == "zip":
        archive = Archive(data, where)
        names = archive.names()
        if any(n.endswith("/data.pkl") for n in names):
            kind, tree = "torch-zip", torch_files.read_zip(archive)
        elif any(n.endswith(".npy") for n in names):
            kind, tree = "npz", arrays.read_npz(archive)
    elif kind == "torch-legacy":
        tree = torch_files.read_legacy(data, where)
    elif kind == "pickle":
        tree = pickle.load(data, where)[0]
    elif kind == "npy":
        tree = arrays.read_npy(data, where)
    elif kind == "json":
        tree = _read_json(data, where)
    elif kind == "msgpack":
        tree = msgpack.read(data, where)
    elif kind in ("gzip", "zlib"):
        inner = sniff(memoryview(inflate.peek(data, where)))
        if inner in ("msgpack", "json"):  # anything else is left alone, so that nothing is unpacked for nothing
            content = inflate.inflate(data, where)
            tree, size = (msgpack.read if inner == "msgpack" else _read_json)(content, where), len(content)
    elif kind == "safetensors":
        tensors, meta = safetensors.read(data, where)
        return Manifest(path, kind, len(data), dict(tensors), tensors, meta)
    # A snapshot of thousands of images has a hundred values for each.
    found, meta_, modules = _flatten(tree, where, msgpack.MAX_VALUES if tree and kind in _PACKED else MAX_NODES)
    if kind in ("torch-zip", "torch-legacy", "pickle", "npy"):
        _refuse_programs(tree if kind != "npy" else None, found, modules, where)
    if sum(getattr(t, "nbytes", 0) for t in found.values()) > 8 * size + (256 << 20):
        raise InputError(f"{where}: its tensors claim far more than the file's {size} bytes")
    return Manifest(path, kind, len(data), tree, found, meta_)


def _read_json(data: memoryview, where: str) -> Any:
    if len(data) > MAX_JSON:
        raise InputError(f"{where}: a JSON text of {len(data)} bytes: too large")
    try:
        return json.loads(bytes(data).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: corrupt JSON: {error}") from error


def _flatten(tree: Any, where: str, left: int = MAX_NODES) -> tuple[dict[str, LazyTensor], dict[str, Any], list[Stub]]:
    """(tensors by path, scalars by path, pickled modules), in file order, with bounded work."""
    tensors: dict[str, LazyTensor] = {}
    meta: dict[str, Any] = {}
    modules: list[Stub] = []
    todo: list[tuple[str, Any, int]] = [("", tree, 0)]
    while todo:
        name, value, depth = todo.pop()
        left -= 1
        if left < 0 or depth > MAX_DEPTH:
            raise InputError(f"{where}: nested too deep, too wide or in a circle at {name[:60]!r}")
        if isinstance(value, Array):
            value = value.tensor if value.tensor is not None else value.items
        if isinstance(value, (RawTensor, StridedTensor, JoinedTensor)):
            tensors.setdefault(name or "array", value)
            continue
        if isinstance(value, Stub):
            if value.is_module:
                modules.append(value)
            elif value.entries or value.items:
                todo.append((name, value.entries or value.items, depth + 1))
            continue
        pairs: Any = (
            value.items() if isinstance(value, dict) else enumerate(value) if type(value) in (list, tuple) else ()
        )
        inner = [(f"{name}.{k}" if name else str(k), v, depth + 1) for k, v in pairs if isinstance(k, (str, int))]
        todo.extend(reversed(inner))
        if type(value) in (str, int, float, bool) and len(name) <= 200 and len(meta) < 4096:
            meta[name or "value"] = value[:2000] if isinstance(value, str) else value
    return tensors, meta, modules


def _refuse_programs(tree: Any, tensors: Mapping[str, Any], modules: list[Stub], where: str) -> None:
    """A pickled program or module is no checkpoint: what it computes stands in code that we will not run."""
    top = tree if isinstance(tree, Stub) and not (tree.entries or tree.items) else None
    stub = top or (modules[0] if modules and not tensors else None)
    if stub is not None:
        what = "a whole model" if stub.is_module or stub.name.startswith("__torch__") else "an object"
        raise UnsafeError(
            f"{where}: {what} of class {stub.name!r:.100} is pickled here, which only its own code can open: refused, "
            "nothing was run",
            hint="save the state_dict instead: torch.save(model.state_dict(), ...)",
        )


def as_mapping(value: Any) -> Mapping[str, Any] | None:
    """``value`` if it is a mapping with text keys (a dict, or an unknown class that acts as one), else None."""
    entries = value.entries if isinstance(value, Stub) else value
    return entries if isinstance(entries, dict) and all(isinstance(k, str) for k in entries) else None
