"""A short run of the fuzzer, and that it would notice: crashes, hangs, memory. The long run: ``benchmarks/fuzz.py``."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pvdconvert.containers import open_bytes
from pvdconvert.identify import choose
from pvdconvert.loading import take_apart
from pvdconvert.plugin import ReadOptions
from pvdconvert.registry import default
from pvdconvert.scene import Box
from tests.fuzz import corpus, drive

SECONDS, INPUTS = 20, 8000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus."""
    path = tmp_path_factory.mktemp("corpus")
    corpus.build(path)
    return path


@pytest.fixture(scope="module")
def seeds(folder: Path) -> list[drive.Seed]:
    return drive.seeds(folder)


def test_every_format_that_reads_has_seeds_that_are_its_own(seeds: list[drive.Seed]) -> None:
    registry = default()
    readable = {name for name, entry in registry.formats().items() if entry.spec.can_read and entry.origin.builtin}
    assert readable - {s.format for s in seeds} == set(), "add a builder to tests/fuzz/corpus.py"
    for seed in seeds:
        found = choose(open_bytes(seed.data, seed.path), None, registry).found
        assert found is not None, seed.path
        assert found.format == seed.format
        extra = {k: v for k, v in seed.extra.items() if k != "bounds"}
        read = ReadOptions(bounds=Box.cube(1.0) if "bounds" in seed.extra else None, extra=extra)
        assert take_apart(found, read, registry).tensors


def test_what_is_written_again_unchanged_is_still_the_same_format(seeds: list[drive.Seed]) -> None:
    """The encoders of the mutator lose nothing that a format needs."""
    for seed in seeds:
        if seed.encode is not None:
            found = choose(open_bytes(seed.encode(seed.tree), seed.path), None, default()).found
            assert found is not None, seed.path
            assert found.format == seed.format


def test_inputs_are_made_of_their_number_alone(seeds: list[drive.Seed]) -> None:
    small = [s for s in seeds if len(s.data) < 200_000]
    again = [[drive.mutant(random.Random(f"0/{k}"), small[k % len(small)]) for k in range(60)] for _ in range(2)]
    assert again[0] == again[1]
    assert len(set(again[0])) > 50


SHORT = """
import json, sys
from pathlib import Path
from tests.fuzz import drive
drive.quiet_environment()
drive.limit_memory()
seen = drive.run(Path(sys.argv[1]), int(sys.argv[2]), seconds=float(sys.argv[3]))
assert "torch" not in sys.modules
print(json.dumps({k: v for k, v in vars(seen).items()}))
"""


def test_a_short_run(folder: Path, repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHORT, folder, str(INPUTS), str(SECONDS)],
        cwd=repo, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    assert seen["crashes"] == []
    total, opened, reached = (sum(seen[k].values()) for k in ("inputs", "opened", "reached"))
    assert total > 200
    assert opened >= 0.3 * total
    assert reached >= 0.05 * total


def test_a_crash_is_noticed_and_can_be_run_again(
    folder: Path, seeds: list[drive.Seed], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(data: bytes, path: Path) -> None:
        raise OSError("oops")

    monkeypatch.setattr(drive, "seeds", lambda at: seeds)
    monkeypatch.setattr(drive, "open_bytes", broken)
    seen = drive.run(folder, 3, seed=9)
    assert len(seen.crashes) == 3
    assert "input 9/0: OSError('oops')" in seen.crashes[0]


def test_a_hang_is_noticed(folder: Path, seeds: list[drive.Seed], monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: bytes, path: Path) -> None:
        time.sleep(30)

    monkeypatch.setattr(drive, "seeds", lambda at: seeds)
    monkeypatch.setattr(drive, "open_bytes", slow)
    monkeypatch.setattr(drive, "SECONDS", 0.2)
    (crash,) = drive.run(folder, 1).crashes
    assert "Hang()" in crash


def missing() -> None:
    raise KeyError("missing")


def test_a_slip_of_a_format_is_counted_and_one_of_a_container_is_a_crash(
    folder: Path, seeds: list[drive.Seed], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pvdconvert.containers import safetensors

    own = [s for s in seeds if s.format == "pvdconvert"]
    monkeypatch.setattr(drive, "seeds", lambda at: own)
    code = default().format("pvdconvert")
    monkeypatch.setattr(code, "read", lambda manifest, options: missing(), raising=False)
    seen = drive.run(folder, 30)
    assert seen.crashes == []
    assert sum(seen.slips.values()) == sum(seen.reached.values()) > 0
    monkeypatch.setattr(safetensors, "check_shape", lambda shape: missing())
    monkeypatch.setattr(safetensors, "_unique", lambda pairs: 1 // 0)
    assert drive.run(folder, 30).crashes


def test_memory_is_limited(repo: Path) -> None:
    code = "from tests.fuzz import drive\ndrive.limit_memory()\nbytearray(3 << 30)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr
