"""Drives mutated files through the real road: container, probes, reader, every tensor. Imports no torch.

Whatever comes out must be a PvdError or a sound read. What a reader slips on (a KeyError that the road turns into an
InputError) is counted apart: it is no crash, but a message that could be better.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pvdconvert.containers import Manifest, open_bytes
from pvdconvert.errors import PvdError
from pvdconvert.identify import choose
from pvdconvert.loading import SLIPS, Asked
from pvdconvert.plugin import ReadOptions
from pvdconvert.registry import Registry, default
from pvdconvert.scene import Box
from tests.fuzz import mutate

SECONDS = 20.0
"""An input that takes longer hangs; generous, because machines are shared."""
MEMORY = 1 << 30
"""Bytes of address space that a job may add to what it has at its start."""
MAX_TENSOR = 64 << 20
BYTES = 0.55
"""Share of the inputs whose bytes are changed, not their structure."""
RARELY = ((200_000, 12), (2_000_000, 100))
"""Seeds of more bytes than this are taken so much more rarely: they cost so much more time."""
CRASHES_KEPT = 20


class Hang(BaseException):
    """An input took too long."""


@dataclass
class Seed:
    """A sound file, decoded: ``tree`` and ``encode`` are None where only bytes can be changed."""

    format: str
    path: Path
    data: bytes
    extra: dict[str, str]
    tree: Any
    encode: Any
    texts: dict[Path, bytes]


@dataclass
class Outcome:
    """Counts by format of the seed; ``crashes`` by (seed, index): enough to run that input again."""

    inputs: Counter[str] = field(default_factory=Counter)
    opened: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    read: Counter[str] = field(default_factory=Counter)
    slips: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        for name in ("inputs", "opened", "reached", "read", "slips"):
            getattr(self, name).update(getattr(other, name))
        self.crashes += other.crashes
        self.seconds = max(self.seconds, other.seconds)


def seeds(folder: Path) -> list[Seed]:
    """The corpus that ``tests.fuzz.corpus`` wrote, in a fixed order."""
    out = []
    for note in sorted(folder.glob("*/seed.json")):
        told = json.loads(note.read_text())
        path = note.parent / told["file"]
        data = path.read_bytes()
        manifest = open_bytes(data, path)
        decoded = mutate.decode(manifest.kind, manifest, data)
        tree, encode = decoded or (None, None)
        beside = [p for p in sorted(note.parent.rglob("*")) if p.suffix in (".txt", ".yml", ".json") and p != note]
        texts = {p: p.read_bytes() for p in beside}
        out.append(Seed(told["format"], path, data, told["extra"], tree, encode, texts))
    return out


def mutant(rng: random.Random, seed: Seed) -> bytes:
    """The bytes of a mutated ``seed``; now and then a text beside it is mutated, too."""
    if seed.encode is None or rng.random() < BYTES:
        return mutate.flip(rng, seed.data)
    data: bytes = seed.encode(mutate.change(rng, seed.tree))
    return data if rng.random() < 0.95 else mutate.flip(rng, data)


def options(rng: random.Random, seed: Seed) -> ReadOptions:
    """Mostly what the seed needs ("bounds" in its extra entries: a box); at times nothing, everything or nonsense."""
    chance = rng.random()
    extra = {} if chance < 0.1 else dict(seed.extra)
    if chance > 0.9 and extra:
        extra[rng.choice(list(extra))] = rng.choice(("0", "-1", "nan", "x", "1e400", "7"))
    bounds = extra.pop("bounds", "")
    if rng.random() < 0.3:
        return ReadOptions(Box.cube(rng.choice((0.5, 1.0, 2.0))), (0.0, 0.5, 1.0), 0.1, 9.0, None, extra)
    return ReadOptions(bounds=Box.cube(1.0) if bounds else None, extra=extra)


def run_one(rng: random.Random, seed: Seed, registry: Registry, seen: Outcome) -> None:
    """One input. Raises whatever is neither a refusal nor a slip."""
    data, read = mutant(rng, seed), options(rng, seed)
    name, forced = seed.format, rng.random() < 0.5
    seen.inputs[name] += 1
    try:
        manifest: Manifest = open_bytes(data, seed.path)
        if manifest.kind == "unknown":
            return
        seen.opened[name] += 1
        told = choose(manifest, name if forced else None, registry)
        for candidate in told.candidates:
            if candidate.reason.startswith("its probe failed"):
                raise RuntimeError(f"probe of {candidate.format}: {candidate.reason}")
        if told.found is None:
            assert told.error is not None
            raise told.error
        seen.reached[told.found.format] += 1
        parts = registry.format(told.found.format).read(told.found.manifest, Asked.of(read))
        for tensor in parts.tensors.values():
            if tensor.numpy().nbytes > MAX_TENSOR:
                raise MemoryError
        seen.read[told.found.format] += 1
    except PvdError as error:
        if "\n" in str(error) or len(str(error)) > 2000:
            raise RuntimeError(f"an error of several lines or without an end: {error!r:.100}") from error
    except SLIPS as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "pvdconvert" in f.filename]
        at = ours[-1] if ours else frame
        if (
            "pvdconvert/containers" in at.filename
            and at.name != "numpy"
            and "formats" not in "".join(f.filename for f in ours)
        ):
            raise  # a container must word its own refusals
        seen.slips[f"{Path(at.filename).name}:{at.lineno} {type(error).__name__}"] += 1


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hang


def limit_memory(more: int = MEMORY) -> None:
    """Let this process map at most ``more`` bytes beyond what it has mapped."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, resource.getrlimit(resource.RLIMIT_AS)[1]))


def run(
    folder: Path, count: int, *, start: int = 0, seconds: float | None = None, seed: int = 0, formats: str = ""
) -> Outcome:
    """Inputs ``start`` .. ``start + count`` of the endless list that ``seed`` stands for, or as many as fit in time."""
    found = [s for s in seeds(folder) if not formats or s.format in formats.split(",")]
    # Every format has the same share, however many seeds it has, unless all of them are large.
    count_of = Counter(s.format for s in found)
    rarely = [max((by for size, by in RARELY if len(s.data) > size), default=1) for s in found]
    weights = [1 / count_of[s.format] / by for s, by in zip(found, rarely, strict=True)]
    registry, seen = default(), Outcome()
    before = signal.signal(signal.SIGALRM, _alarm)
    begin = time.monotonic()
    warnings.simplefilter("ignore")  # of numpy, about numbers that a mutation made
    try:
        for index in range(start, start + count):
            if seconds is not None and time.monotonic() - begin > seconds:
                break
            rng = random.Random(f"{seed}/{index}")
            one = rng.choices(found, weights)[0]
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                with _beside(rng, one):
                    run_one(rng, one, registry, seen)
            except (Exception, Hang) as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(frame.filename).name}:{frame.lineno}"
                if len(seen.crashes) < CRASHES_KEPT:
                    seen.crashes.append(f"{one.path.parent.name}, input {seed}/{index}: {error!r:.200} at {where}")
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    seen.seconds = time.monotonic() - begin
    return seen


class _beside:
    """One input in ten of a seed with texts beside it has one of them mutated meanwhile."""

    def __init__(self, rng: random.Random, seed: Seed) -> None:
        self.path = rng.choice(list(seed.texts)) if seed.texts and rng.random() < 0.1 else None
        self.before = b"" if self.path is None else seed.texts[self.path]
        if self.path is not None:
            self.path.write_bytes(mutate.flip(rng, self.before))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            self.path.write_bytes(self.before)


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the parts of ``total``."""
    for start in range(0, total, size):
        yield start, min(size, total - start)


def quiet_environment() -> None:
    """One thread; no third parties."""
    os.environ["PVDCONVERT_PLUGINS"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
