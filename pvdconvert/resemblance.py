"""What a file looks like to somebody who knows checkpoints: for files that no format reads. Imports no torch."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from pvdconvert.containers import Manifest
from pvdconvert.errors import InputError, PvdError, UnknownError
from pvdconvert.plugin import LazyTensor

MAX_GROUPS = 16
_HEAD = 1 << 16
_STARTS = {
    b"\x89HDF\r\n": "an HDF5 file, as Keras writes: save the weights as .npz or .safetensors",
    b"glTF": "a glTF scene, which holds meshes",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"%PDF": "a PDF document",
    b"GGUF": "a GGUF language model",
    b"BZh": "a bzip2 archive: unpack it first",
    b"\xfd7zXZ": "an xz archive: unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstandard archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a RAR archive: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer in place of the file: git lfs pull",
    b"<!doctype html": "a web page, not the file behind its link: download that",
    b"<html": "a web page, not the file behind its link: download that",
}
_TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"
"""The last bytes of a TensorFlow checkpoint's .index."""
_SPLATS = (
    {"xyz", "means", "means3d", "positions"},
    {"scales", "scaling", "_scaling"},
    {"quats", "rotation", "_rotation", "rotations"},
    {"opacities", "opacity", "_opacity"},
    {"sh0", "shn", "features_dc", "_features_dc", "f_dc", "colors", "colors_all"},
)


def foreign(path: Path) -> PvdError:
    """The refusal of a file whose first bytes are those of no container that can hold a field."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(-min(8, path.stat().st_size), 2)
            tail = file.read(8)
    except OSError as error:
        return InputError(f"{path}: cannot be read: {error.strerror or error}")
    if head[:4] in (b"ply\n", b"ply\r"):
        return _ply(path, head)
    if head[257:262] == b"ustar":
        return InputError(f"{path}: not a checkpoint but a tar archive: unpack it first")
    if tail == _TABLE_END:
        return InputError(f"{path}: the index of a TensorFlow checkpoint: save the weights as .npz or .npy instead")
    start = head.lstrip()[:32]
    for mark, what in _STARTS.items():
        if start.startswith(mark) or (mark[:1] == b"<" and start.lower().startswith(mark)):
            return InputError(f"{path}: not a checkpoint but {what}")
    return InputError(
        f"{path}: not a checkpoint: its first bytes are those of no known container",
        hint="pvdconvert formats lists what can be read",
    )


def _ply(path: Path, head: bytes) -> PvdError:
    text = head.partition(b"end_header")[0].decode("ascii", "replace")
    properties = set(re.findall(r"property\s+\w+\s+(\w+)", text))
    found = re.search(r"element\s+vertex\s+(\d{1,12})", text)
    count = f"{int(found[1]):,} " if found else ""
    if {"f_dc_0", "opacity", "scale_0", "rot_0"} <= properties:
        return _no_splats(path, f"a .ply of {count}3D Gaussian splats")
    what = "a triangle mesh" if re.search(r"element\s+face\s+[1-9]", text) else f"a cloud of {count}points"
    return InputError(f"{path}: not a radiance field but {what} (.ply)")


def _no_splats(path: Path, what: str) -> UnknownError:
    return UnknownError(
        f"{path}: {what}: not supported, they are no field that can be asked at a point",
        hint="pvdconvert formats lists what can be read",
    )


def splats(manifest: Manifest) -> PvdError | None:
    """The refusal of 3D Gaussian splats, whatever container they are in; None if the file holds none."""
    last = {name.rpartition(".")[2].lower() for name in manifest.tensors}
    shapes = {t.shape for t in manifest.tensors.values()}
    counts = {s[0] for s in shapes if len(s) == 2 and s[1] == 4 and s[0] > 0}
    packed = [n for n in counts if {(n, 3), (n, 1), (n, 1, 3)} <= shapes]  # the tuple of the original program
    if sum(bool(last & names) for names in _SPLATS) >= 4 or packed:
        rows = max((s[0] for s in shapes if s), default=0)
        return _no_splats(manifest.path, f"a {manifest.kind} file of {rows:,} 3D Gaussian splats")
    if manifest.kind == "gzip" and not manifest.tensors and _gzip_head(manifest.path).startswith(b"NGSP"):
        return _no_splats(manifest.path, "an .spz of 3D Gaussian splats")
    return None


def _gzip_head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return zlib.decompressobj(31).decompress(file.read(4096), 16)
    except (OSError, zlib.error):
        return b""


def describe(manifest: Manifest) -> str:
    """What the file holds, in a line: container, number of tensors, what they look like, their groups."""
    if manifest.kind == "folder":
        if not manifest.children:
            return "a folder without a checkpoint in it"
        return f"a folder with {len(manifest.children)} checkpoint-like files"
    tensors = manifest.tensors
    if not tensors:
        keys = [k for k in manifest.tree if isinstance(k, str)] if isinstance(manifest.tree, dict) else []
        named = f" (keys: {', '.join(f'{k:.40}' for k in keys[:6])}{', ...' if len(keys) > 6 else ''})" if keys else ""
        return f"a {manifest.kind} file without tensors{named}"
    total = sum(math.prod(t.shape) for t in tensors.values())
    shown = []
    groups = grouped(tensors)
    for name, keys in list(groups.items())[:5]:
        shape = "x".join(map(str, tensors[keys[0]].shape)) or "scalar"
        shown.append(f"{name:.60} {shape}" if len(keys) == 1 else f"{name:.60} ({len(keys)} tensors)")
    what = looks_like(tensors)
    article = "an" if manifest.kind.startswith("np") else "a"
    text = f"{article} {manifest.kind} file of {len(tensors)} tensor{'s'[: len(tensors) != 1]} with {total:,} numbers"
    return f"{text}{f' that looks like {what}' if what else ''}: {', '.join(shown)}{', ...' if len(groups) > 5 else ''}"


def grouped(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their first words: as few words as tell three groups apart, but at most 16, and not every name alone."""
    names = list(names)
    best: dict[str, list[str]] = {}
    for depth in (1, 2, 3):
        groups: dict[str, list[str]] = {}
        for name in names:
            words = name.split(".")
            groups.setdefault(".".join(words[:depth]), []).append(name)
        if best and (len(groups) > MAX_GROUPS or (len(groups) == len(names) and len(best) > 1)):
            break
        best = groups
        if len(groups) >= 3:
            break
    return best


def looks_like(tensors: Mapping[str, LazyTensor]) -> str:
    """A guess in a few words, from names and shapes; "" where nothing is familiar."""
    names = [n.lower() for n in tensors]
    shapes = [t.shape for t in tensors.values()]

    def having(pattern: str) -> int:
        return sum(bool(re.search(pattern, n)) for n in names)

    weights = [s for s in shapes if len(s) >= 2]
    convolutions = sum(len(s) == 4 and s[2] == s[3] <= 11 for s in weights)
    if names and having(r"exp_avg|momentum_buffer|^(optimizer\.)?state\.\d+\.") == len(names):
        return "the state of an optimizer, without the weights"
    if having(r"lora_(a|b|up|down)\b") >= 2:
        return "LoRA adapters of a transformer"
    if having(r"(down|up|input|output)_blocks\.") and convolutions:
        return "a diffusion U-Net"
    if having(r"attn|attention|q_proj|qkv|self_att") >= 2:
        return "a vision transformer" if having(r"patch_embed") else "a transformer"
    if weights and 3 * convolutions > len(weights):
        if having(r"(^|\.)layer[1-4]\.\d+\.(conv|bn|downsample)"):
            return "a ResNet-like convolutional network"
        return "a convolutional network"
    if having(r"weight_ih_l\d") and having(r"weight_hh_l\d"):
        return "a recurrent network"
    if having(r"sdf|deviation_network|variance_network"):
        return "a signed-distance field"
    return _field_like([t.shape for t in tensors.values() if "float" in t.dtype])


def _field_like(shapes: list[tuple[int, ...]]) -> str:
    """Guesses among radiance fields of programs that we do not know."""
    if any(len(s) == 5 and s[0] == 1 and min(s[2:]) > 4 for s in shapes):
        return "a dense voxel grid"
    if sum(len(s) == 4 and s[0] == 1 and min(s[2:]) > 16 for s in shapes) >= 3:
        return "a field of feature planes"
    if any(len(s) == 2 and s[1] in (2, 4, 8) and s[0] >= 8192 for s in shapes):
        return "a field with a table of features, as hash grids have"
    matrices = [s for s in shapes if len(s) == 2 and min(s) > 0]
    if len(matrices) >= 2 and all(len(s) <= 2 for s in shapes):
        first = matrices[0]
        octaves = {3 * (2 * k + 1): k for k in range(1, 17)} | {6 * k: k for k in range(2, 17)}
        encoded = next((n for n in (first[1], first[0]) if n in octaves), None)
        if encoded is not None:
            return f"an MLP of a position in {octaves[encoded]} frequencies ({encoded} inputs)"
        return "a multi-layer perceptron"
    return ""
