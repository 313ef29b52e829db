"""Bounds on memory: what is free, how large a store may be, and a store in files that is the same to the last bit."""

from __future__ import annotations

import dataclasses
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import pvdconvert
from pvdconvert import asking, memory
from pvdconvert.asking import MAX_SAMPLES, Room, room_for
from pvdconvert.distill.scratch import IN_MEMORY, Scratch
from pvdconvert.errors import OutputError, UsageError
from pvdconvert.render.occupancy import CHUNK, Occupancy
from pvdconvert.testing.analytic import AnalyticScene

STEPS = "scout=1;labels=2;features=2/2;density=4/4;color=4/4;render=4/4"


@pytest.mark.parametrize(
    ("text", "size"),
    [("6G", 6e9), ("6 GB", 6e9), ("1.5GiB", 1.5 * 2**30), ("4e9", 4e9), ("700mib", 700 * 2**20), ("1T", 1e12)],
)
def test_sizes(text: str, size: float) -> None:
    assert memory.parse(text) == int(size)


@pytest.mark.parametrize("text", ["", "much", "6X", "-4G", "100M", "0", "9999999T", "4 G G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--max-memory"):
        memory.parse(text)


def test_the_smaller_of_machine_and_control_group_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, group = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    group.mkdir()
    monkeypatch.setattr(memory, "_PROC", proc)
    monkeypatch.setattr(memory, "_CGROUP", group)
    assert memory.free() is None
    (proc / "meminfo").write_text("MemTotal:  90 kB\nMemAvailable:     50 kB\n")
    assert memory.free() == 50 * 1024
    (group / "memory.max").write_text("max\n")
    assert memory.free() == 50 * 1024
    (group / "memory.max").write_text("40000\n")
    (group / "memory.current").write_text("25000\n")
    (group / "memory.stat").write_text("anon 9\ninactive_file 3000\n")
    assert memory.free() == 40000 - 25000 + 3000
    (group / "memory.max").unlink()
    (group / "memory").mkdir()
    for name, text in (("limit_in_bytes", "30000"), ("usage_in_bytes", "29000"), ("stat", "total_inactive_file 5")):
        (group / "memory" / f"memory.{name}").write_text(text)
    assert memory.free() == 1005


@pytest.mark.parametrize(
    ("text", "there"),
    [("always [madvise] never", True), ("[always] madvise never", True), ("always madvise [never]", False)],
)
def test_huge_pages(text: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_HUGE", tmp_path / "enabled")
    assert memory.huge_pages() is None
    (tmp_path / "enabled").write_text(text + "\n")
    assert memory.huge_pages() is there


def test_what_this_process_takes() -> None:
    before, size = memory.resident(), 1 << 26
    with mmap.mmap(-1, size) as block:  # pages of its own: an allocator may hand out ones that it has kept
        block.write(b"\1" * size)
        assert memory.resident() >= before + size // 2
        assert memory.peak() >= memory.resident()


def test_a_store_follows_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 40}))  # type: ignore[attr-defined]
    assert Room.of(1 << 40, tmp_path) == Room()
    small = Room.of(1 << 30, tmp_path)
    assert small.scratch.folder == tmp_path
    assert (1 << 30) // asking.BYTES < small.samples < MAX_SAMPLES
    assert small.candidates < Room().candidates
    assert "mapped" in str(small)
    assert small.held == small.samples
    half = Room.of(5 * MAX_SAMPLES * asking.BYTES // 2, tmp_path)
    assert half.held == 2 * MAX_SAMPLES
    assert Room().told(adds=True) is None
    assert "28.0 M with those of later rounds" in (dataclasses.replace(Room(), held=half.held).told(adds=True) or "")
    assert dataclasses.replace(Room(), held=half.held).told(adds=False) is None
    assert "mapped" in (small.told(adds=False) or "")
    alone = Room.of(1 << 30, None)
    assert alone.scratch is IN_MEMORY
    assert alone.samples == (1 << 30) // asking.BYTES
    assert Room.of(-5, None).samples == asking.FEWEST_SAMPLES
    monkeypatch.setattr(asking.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 20}))  # type: ignore[attr-defined]
    assert Room.of(1 << 30, tmp_path) == alone
    monkeypatch.setattr(memory, "free", lambda: 1 << 30)
    halves = [room_for(None, torch.device("cpu"), None, among).samples for among in (1, 2)]
    assert halves[0] > halves[1]
    monkeypatch.setattr(memory, "free", lambda: None)
    assert room_for(None, torch.device("cpu"), None) == Room()


def test_files_of_a_store_have_no_name(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    a, b = torch.arange(6.0).view(2, 3), torch.arange(9.0).view(3, 3)
    joined = scratch.cat([a, b])
    assert torch.equal(joined, torch.cat([a, b]))
    assert os.listdir(tmp_path) == []
    mask = torch.tensor([True, False, True, False, True])
    assert torch.equal(scratch.select(joined, mask), joined[mask])
    assert torch.equal(scratch.select(joined, torch.tensor([4, 0])), joined[[4, 0]])
    for kind in (torch.bool, torch.int64):
        assert torch.equal(scratch.hold(a.to(kind)), a.to(kind))
    assert scratch.hold(a[:0]).shape == (0, 3)
    assert IN_MEMORY.hold(a) is a


def test_a_disk_without_room_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"No space left.*--max-memory"):
        Scratch(tmp_path).hold(torch.ones(3))
    assert os.listdir(tmp_path) == []


def test_looking_up_many_points_is_looking_up_each() -> None:
    grid = (torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0)) < 0.4).byte()
    cells = Occupancy(torch.tensor([-1.0, 0.0, 0.5]), 0.3, grid)
    x = torch.rand(CHUNK + 1000, 3, generator=torch.Generator().manual_seed(1)) * 3 - 1
    assert torch.equal(cells.contains(x), torch.cat([cells.contains(x[:700]), cells.contains(x[700:])]))


def test_a_mapped_store_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    field = AnalyticScene()

    def convert(name: str) -> Path:
        out = tmp_path / name / "o.safetensors"
        out.parent.mkdir()
        sets = {"log2_table": 10, "levels": 4}
        report = pvdconvert.convert(field, "ngp", scene=field.scene, out=out, steps=STEPS, sets=sets, validate=False)
        assert os.listdir(out.parent) == ["o.safetensors"]
        assert any("mapped" in note for note in report.notes) is (name == "mapped")
        return out

    one = convert("memory")
    monkeypatch.setattr(memory, "free", lambda: 3 << 29)
    assert convert("mapped").read_bytes() == one.read_bytes()
