"""What every file layout must do, ours or not."""

from __future__ import annotations

import functools
import gzip
import io
import json
import pickle
import tempfile
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgpack
import numpy as np
import torch

from pvdconvert import registry as registries
from pvdconvert.containers import Manifest, open_manifest
from pvdconvert.errors import PvdError, RequestError
from pvdconvert.field import RadianceField
from pvdconvert.plugin import API_VERSION, ArrayTensor, Format, Match, Parts, ReadOptions, option_help
from pvdconvert.testing.checks import Check, Failed, expect, expect_torch_free, plain, run_all
from pvdconvert.testing.subject import SMALL_MB, Subject

ANY = "*"


class FormatSubject:
    """A format, a folder to write in, and small fields of the architectures that it holds."""

    def __init__(self, name: str, registry: registries.Registry | None = None) -> None:
        self.registry = registry or registries.default()
        self.name = name
        self.code: Format = self.registry.format(name)
        self.entry = self.registry.formats()[name]
        self.probe: Callable[[Manifest], Match | None] = dict(self.registry.probes()).get(name, lambda manifest: None)
        folder = tempfile.TemporaryDirectory(prefix="pvdconvert-selftest-")
        weakref.finalize(self, folder.cleanup)
        self.folder = Path(folder.name)

    @property
    def architectures(self) -> list[str]:
        """Names of the installed architectures that the format says it holds."""
        installed = self.registry.architectures()
        held = self.entry.spec.architectures
        return [n for n in installed if n in held or ANY in held]

    @functools.cached_property
    def written(self) -> Mapping[str, tuple[Path, Parts]]:
        """Architecture -> the file of a small field of it, and what was written. Empty for a read-only format."""
        out: dict[str, tuple[Path, Parts]] = {}
        for name in (n for n in self.architectures if {ANY, n} & set(self.entry.spec.written)):
            parts = self._small(name)
            path = self.folder / f"{name}{(*self.entry.spec.suffixes, '.bin')[0]}"
            self.code.write(parts, path)
            out[name] = (path, parts)
        return types.MappingProxyType(out)

    def _small(self, name: str) -> Parts:
        subject = Subject(name, self.registry)
        limits = self.code.limits(name)
        for size in (*SMALL_MB, 128.0):  # a layout may fix a table's size
            try:
                config = subject.code.plan(subject.facts, type(subject.budget)("fast", max_mb=size), limits, {})
                break
            except RequestError:
                continue
        else:
            raise Failed(f"no student of {name!r} within 128 MB keeps to limits({name!r})")
        field: RadianceField = subject.code.build(config, subject.scene, 0)
        field.restrict(subject.occupancy)
        config, tensors = subject.code.save(field)
        lazy = {key: ArrayTensor(t.detach().cpu().numpy().copy()) for key, t in tensors.items()}
        return Parts(name, config, lazy, subject.scene, {"made by": "selftest"})


def zoo(folder: Path) -> Iterator[Path]:
    """Files and folders of many containers in which no format of the world should see a checkpoint of its own."""
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((4, 3)).astype(np.float32)

    def put(name: str, data: bytes) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    yield put("random.bin", rng.bytes(4096))
    yield put("text.txt", b"not a checkpoint\n")
    yield put("empty.json", b"{}")
    yield put("list.json", b"[1, 2, 3]")
    yield put("config.json", json.dumps({"model": {"state_dict": None}, "config": [1, {"a": "b"}]}).encode())
    yield put("empty.pkl", pickle.dumps({}))
    yield put("dict.pkl", pickle.dumps({"model": {"weight": [1.0, 2.0]}, "epoch": 3}))
    yield put("map.msgpack", msgpack.packb({"snapshot": {"params_type": "float"}, "encoding": {}}))
    yield put("packed.gz", gzip.compress(b"hello"))
    arrays = {
        "array.npy": numbers,
        "objects.npy": np.array([numbers, numbers[0], None], dtype=object),
        "scalar.npy": np.array(3),
    }
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        yield put(name, buffer.getvalue())
    buffer = io.BytesIO()
    np.savez(buffer, a=numbers, b=np.arange(5))
    yield put("arrays.npz", buffer.getvalue())
    values: dict[str, object] = {
        "empty.pt": {},
        "tensor.pt": torch.zeros(3),
        "state.pt": {"model": {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, "epoch": 1},
        "list.pt": [torch.zeros(2), "text", None, {"a": (1, 2)}],
    }
    for name, value in values.items():
        for legacy in (False, True):
            buffer = io.BytesIO()
            torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
            yield put(f"legacy-{name}" if legacy else name, buffer.getvalue())
    header = json.dumps({"weight": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}}).encode()
    yield put("foreign.safetensors", len(header).to_bytes(8, "little") + header + numbers.tobytes())
    (folder / "a folder").mkdir()
    yield folder / "a folder"
    yield folder


def spec(s: FormatSubject) -> str:
    found = s.entry.spec
    expect(found.api_version == API_VERSION, f"api_version is {found.api_version}")
    expect(found.title.strip() and "\n" not in found.title, "the title is not one line")
    expect(found.can_read or found.can_write, "neither reads nor writes")
    expect(found.architectures, "holds no architecture")
    unknown = [n for n in found.architectures if n != ANY and n not in s.registry.architectures()]
    expect(isinstance(s.code, Format), f"{found.code} lacks a method of pvdconvert.plugin.Format")
    return f"{s.entry.origin}" + (f"; not installed: {', '.join(unknown)}" if unknown else "")


def torch_free(s: FormatSubject) -> None:
    expect_torch_free(s.entry.origin.value, s.entry.spec.probe, s.entry.spec.code)


def limits(s: FormatSubject) -> str:
    """What a layout demands is known to the architecture, or no student could be planned for it."""
    told = []
    for name in s.architectures:
        fixed = s.code.limits(name).fixed
        known = {key for key, _, _ in option_help(s.registry.options(name))}
        expect(set(fixed) <= known, f"limits({name!r}) fixes unknown keys {sorted(set(fixed) - known)}")
        told.append(f"{name}: {len(fixed)} fixed")
    return ", ".join(told)


def probe_zoo(s: FormatSubject) -> str:
    """The probe raises on nothing, and claims nothing that is not its own."""
    folder = s.folder / "zoo"
    folder.mkdir(exist_ok=True)
    seen = 0
    for path in zoo(folder):
        try:
            manifest = open_manifest(path)
        except PvdError:
            continue
        seen += 1
        found = s.probe(manifest)
        expect(found is None or isinstance(found, Match), f"{path.name}: the probe returns {type(found).__name__}")
        if found is not None:
            expect(0 < found.score <= 1 and found.reason.strip(), f"{path.name}: {found} has no score or reason")
            expect(found.score < 0.3, f"{path.name}: claimed with {found.score} ({found.reason})")
    return f"{seen} files"


def probe_others(s: FormatSubject) -> str:
    """Files of the other installed formats are not claimed above their own format's claim."""
    seen = 0
    for name, entry in s.registry.formats().items():
        if name == s.name or not entry.spec.can_write or not entry.spec.can_read:
            continue
        other = FormatSubject(name, s.registry)
        for path, _ in other.written.values():
            manifest = open_manifest(path)
            own, ours = other.probe(manifest), s.probe(manifest)
            expect(own is not None, f"{name} does not recognise its own {path.name}")
            assert own is not None
            expect(ours is None or ours.score < own.score, f"claims {path.name} of {name} with {ours}")
            seen += 1
    return f"{seen} files"


def write_read(s: FormatSubject) -> str:
    """What is written comes back bit for bit, is recognised by content, and is not changed by writing."""
    if not s.entry.spec.can_write:
        return "read-only"
    from pvdconvert.identify import identify

    told = []
    expect(s.written, "writes, but no architecture that it holds is installed")
    for name, (path, parts) in s.written.items():
        copies = {key: t.numpy().copy() for key, t in parts.tensors.items()}
        config = json.loads(json.dumps(parts.config))
        again = path.with_name("again.bin")
        s.code.write(parts, again)
        expect(again.read_bytes() == path.read_bytes(), f"{name}: the same parts make another file the second time")
        again.unlink()
        expect(plain(parts.config) == config, f"{name}: write changes the configuration that it was given")
        for key, before in copies.items():
            expect(np.array_equal(parts.tensors[key].numpy(), before), f"{name}: write changes the tensor {key!r}")
        if not s.entry.spec.can_read:
            continue
        found = identify(path, None, s.registry)
        expect(found.format == s.name, f"{name}: what was written is recognised as {found.format!r}")
        back = s.code.read(found.manifest, ReadOptions())
        expect(back.architecture == name, f"{name}: read back as {back.architecture!r}")
        expect(
            back.tensors.keys() == copies.keys(), f"{name}: keys differ: {sorted(back.tensors.keys() ^ copies.keys())}"
        )
        for key, before in copies.items():
            after = back.tensors[key]
            expect(after.shape == before.shape, f"{name}: {key!r} is {after.shape}, was {before.shape}")
            expect(np.array_equal(after.numpy(), before), f"{name}: {key!r} reads back differently")
        _same_field(s, name, parts, back)
        told.append(f"{name} {path.stat().st_size} bytes")
    return ", ".join(told)


def _same_field(s: FormatSubject, name: str, parts: Parts, back: Parts) -> None:
    """The configuration and scene that come back make the same field, bit for bit."""
    if s.entry.spec.native:
        expect(plain(back.config) == plain(parts.config), f"{name}: the configuration reads back differently")
        expect(back.scene == parts.scene, f"{name}: the scene reads back differently")
    code = s.registry.architecture(name)
    subject = Subject(name, s.registry)
    x, d = subject.occupied(500), subject.directions(500, 1)
    answers = []
    for one in (parts, back):
        tensors = {key: torch.from_numpy(np.array(t.numpy())) for key, t in one.tensors.items()}
        field = code.load(dict(one.config), tensors, one.scene)
        with torch.no_grad():
            latent = field.encode(x)
            answers.append((field.density(latent), field.color(latent, d)))
    for ours, theirs, what in zip(*answers, ("density", "colour")):
        expect(torch.equal(ours, theirs), f"{name}: {what} is not bit-equal after write and read")


def hostile(s: FormatSubject) -> str:
    """Cut and altered files are refused in words (or read, where the change does no harm), never with a crash."""
    if not s.entry.spec.can_read:
        return "write-only"
    rng = np.random.default_rng(1)
    tried = refused = 0
    for path, _ in s.written.values():
        data = path.read_bytes()
        cases = [data[: int(len(data) * share)] for share in (0.0, 0.1, 0.5, 0.9, 0.999)]
        for _ in range(24 if len(data) < 1 << 22 else 6):
            changed = bytearray(data)
            for at in rng.integers(0, min(len(data), 2048), 3):
                changed[at] ^= int(rng.integers(1, 256))
            cases.append(bytes(changed))
        bad = path.with_name("bad.bin")
        for case in cases:
            bad.write_bytes(case)
            tried += 1
            try:
                manifest = open_manifest(bad)
                if s.probe(manifest) is None:
                    refused += 1
                    continue
                for tensor in s.code.read(manifest, ReadOptions()).tensors.values():
                    tensor.numpy()
            except PvdError as error:
                refused += 1
                expect("\n" not in str(error), "an error of more than one line")
        bad.unlink()
    return f"{refused} of {tried} refused" if tried else "writes nothing to alter"


def refuses_to_write(s: FormatSubject) -> None:
    """A read-only layout, or a field that it cannot hold: RequestError, and no file."""
    path = s.folder / "refused.bin"
    scene = Subject(next(iter(s.registry.architectures())), s.registry).scene
    if s.entry.spec.can_write and ANY in s.entry.spec.architectures:
        return
    try:
        s.code.write(Parts("no-such-architecture", {}, {}, scene), path)
    except RequestError:
        expect(not path.exists(), "leaves a file behind")
        return
    raise Failed("writes a field of an architecture that it does not hold")


CHECKS: dict[str, Callable[[FormatSubject], str | None]] = {
    "spec": spec,
    "torch-free": torch_free,
    "limits": limits,
    "probe-zoo": probe_zoo,
    "probe-others": probe_others,
    "write-read": write_read,
    "hostile": hostile,
    "refuses-to-write": refuses_to_write,
}
"""Every check of a format by name."""


def check_format(name: str, registry: registries.Registry | None = None) -> list[Check]:
    """Run every check on format ``name``. Raises UnknownError if it is not installed."""
    registry = registry or registries.default()
    registry.format(name)
    return run_all(CHECKS, lambda: FormatSubject(name, registry))
