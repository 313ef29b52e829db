"""One conversion by two processes over gloo: what one gives, to float rounding; and one line where one fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

import pvdconvert
from pvdconvert import ranks
from pvdconvert.distill import losses, parallel
from pvdconvert.errors import DeviceError, UsageError
from pvdconvert.settings import Settings
from pvdconvert.testing.analytic import AnalyticScene

GROUP = Path(__file__).with_name("group.py")
STEPS = "scout=1;labels=2;features=2/2;density=4/4;color=6/6;render=6/6"
SETS = {"ngp": {"log2_table": 11, "levels": 5}, "plenoxels": {"resolution": 12}}

pytestmark = pytest.mark.skipif(
    not dist.is_available() or importlib.util.find_spec("torch.distributed.run") is None, reason="needs torchrun"
)


def torchrun(processes: int, *args: str) -> subprocess.CompletedProcess[str]:
    one = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*command, *args], env={**os.environ, **one}, capture_output=True, text=True, timeout=900, check=False
    )


def converted(out: Path, to: str, steps: str) -> dict[str, Any]:
    done = torchrun(2, str(GROUP), str(out), to, json.dumps(SETS[to]), steps, "")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def alone(out: Path, to: str) -> dict[str, Any]:
    field = AnalyticScene()
    report = pvdconvert.convert(field, to, scene=field.scene, out=out, sets=SETS[to], steps=STEPS, validate=False)
    return report.to_json()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    # Of voxels: optimisers that turn the axes of networks make more of a rounding than it is.
    one = alone(tmp_path / "1.safetensors", "plenoxels")
    two = converted(tmp_path / "2.safetensors", "plenoxels", STEPS)
    assert two["replay"] == one["replay"]
    # The very same rays, whoever asked them.
    assert two["plan"]["samples"] == one["plan"]["samples"]
    for a, b in zip(one["stages"], two["stages"], strict=True):
        assert (a["name"], a["steps"]) == (b["name"], b["steps"])
        assert a["psnr_after"] is None or b["psnr_after"] == pytest.approx(a["psnr_after"], abs=0.01)
    a, b = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if tensor.dtype.kind == "f":
            # Adam's first steps are signs of gradients: where one is noise, rounding turns it over.
            off = np.abs(tensor - b[name]) > 1e-3 * np.abs(tensor).max()
            assert off.mean() < 0.02, name


@pytest.mark.slow
def test_by_the_clock_both_take_the_same_steps(tmp_path: Path) -> None:
    found = converted(tmp_path / "o.safetensors", "ngp", "")
    assert {"density", "color", "render"} <= {s["name"] for s in found["stages"] if s["steps"] >= 12}
    assert found["stages"][-1]["psnr_after"] > 20
    assert any("2 processes" in note for note in found["notes"])


@pytest.mark.slow
def test_a_failure_of_one_ends_all_with_one_line(tmp_path: Path) -> None:
    done = torchrun(2, str(GROUP), str(tmp_path / "o.safetensors"), "ngp", json.dumps(SETS["ngp"]), STEPS, "1")
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("rank 1: ")]
    assert ours == ["rank 1: the teacher answers values that are not numbers (its weights are damaged)"]
    assert "lost contact" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_refusal_of_the_command_line_is_one_line(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "pvdconvert", str(tmp_path / "none.ckpt"), "--to", "ngp")
    said = [line for line in done.stderr.splitlines() if line.startswith("pvdconvert: ")]
    assert len(said) == 1, done.stderr
    assert said[0].endswith(f"{tmp_path / 'none.ckpt'}: no such file or folder")


# -- the parts, in processes of their own ----------------------------------------------------------------------------

PARTS = """
import sys
import torch
from torch import nn
import torch.distributed as dist
from pvdconvert.cli.ending import leave
from pvdconvert.distill import losses, parallel
from pvdconvert.solve.lazy_adam import LazyAdam

with parallel.group("cpu") as r:
    assert r.size == 3, r.size
    # A gather keeps the order of the numbers, whoever holds them; 4 parts of lengths 1, 2, 3, 0 and a process without.
    def part(k):
        return (torch.full((k % 4,), k), torch.full((k % 4, 2), k / 2), torch.ones(k % 4, dtype=torch.bool))
    got = r.gather([part(k) for k in range(1, 5) if (k - 1) % 3 == r.rank], torch.device("cpu"))
    assert [len(p[0]) for p in got] == [1, 2, 3, 0]
    assert all((p[0] == k).all() and (p[1] == k / 2).all() and p[2].all() for k, p in zip(range(1, 4), got))
    got = r.gather([part(1)] if r.rank == 0 else [], torch.device("cpu"))
    assert len(got) == 1
    assert r.mine(torch.arange(8)).tolist() == [[0, 3], [1, 4], [2, 5]][r.rank]
    assert r.most(float(r.rank), -float(r.rank)) == [2.0, 0.0]
    assert r.alone(lambda: 7.0 + r.rank)() == 7.0
    # Means with gradients: closed forms of log(mean(x^2))^2 and of a regression on all rows at once.
    class Half(parallel.ParallelDistiller):
        def __init__(self):
            self.ranks = r
    mean = Half()._mean
    torch.manual_seed(0)
    whole, target = torch.randn(12, 4) * 3, torch.randn(12, 2)
    x = whole.clone().requires_grad_()
    losses.too_large(x).backward()
    y = whole[r.rank::3].clone().requires_grad_()
    value = losses.too_large(y, mean)
    value.backward()
    assert torch.allclose(y.grad / 3, x.grad[r.rank::3], rtol=1e-5)
    ours = losses.adapter(whole[r.rank::3], target[r.rank::3], mean)
    assert torch.allclose(ours, losses.adapter(whole, target), rtol=1e-4)
    # Gradients: rows that only one process touched, and a parameter that only one process used.
    table, used, never = (nn.Parameter(torch.zeros(n, 2)) for n in (5, 3, 3))
    step = Half()
    step.optimizer = LazyAdam([{"params": [table], "sparse_rows": True}, {"params": [used, never]}], lr=0.1)
    loss = (table[r.rank] * 3).sum() + (table[4] * 6).sum()
    if r.rank == 1:
        loss = loss + used.sum()
    loss.backward()
    step._share_gradients()
    assert table.grad[:, 0].tolist() == [1, 1, 1, 0, 6], table.grad
    assert table.touched.tolist() == [1, 1, 1, 0, 1]
    assert torch.allclose(used.grad, torch.full((3, 2), 1 / 3))
    assert never.grad is None
    step.optimizer.step()
    assert (table[3] == 0).all() and (table[[0, 1, 2, 4]] != 0).all()
    assert not table.touched.any() and not table.grad.any()
print("fine" if r.rank == 0 else "")
leave(0)
"""


@pytest.mark.slow
def test_three_processes_exchange_what_they_should(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    done = torchrun(3, str(tmp_path / "parts.py"))
    assert done.returncode == 0, done.stderr
    assert "fine" in done.stdout


# -- without a group -------------------------------------------------------------------------------------------------


@pytest.fixture
def torchrun_says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def say(**values: str) -> None:
        names = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
        for name, value in {**names, **values}.items():
            monkeypatch.setenv(name, value)

    return say


def test_one_process_is_no_group(monkeypatch: pytest.MonkeyPatch, torchrun_says: Callable[..., None]) -> None:
    with parallel.group("cpu") as none:
        assert none is None
    assert (ranks.size(), ranks.rank(), ranks.local()) == (1, 0, (0, 1))
    assert ranks.claim()
    # Batch systems set some of these names for programs of one process.
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (ranks.size(), ranks.rank()) == (1, 0)
    torchrun_says(LOCAL_WORLD_SIZE="2")
    assert (ranks.size(), ranks.rank(), ranks.local()) == (2, 1, (1, 2))
    assert ranks.prefix() == "rank 1: "


def test_what_a_group_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, torchrun_says: Callable[..., None]) -> None:
    assert parallel.fit(Settings("ngp", via="nerf")).via == "nerf"  # alone, everything goes
    torchrun_says()
    for settings, said in ((Settings("ngp", via="nerf"), "--via"), (Settings("ngp", method="pvd"), "--method pvd"),
                           (Settings("ngp", device="cuda:0"), "cuda:0")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            parallel.fit(settings)
    assert parallel.fit(Settings("ngp", device="cpu")).device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert parallel.fit(Settings("ngp")).device == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="GPU of its own"):
        parallel.fit(Settings("ngp", device="cuda"))


def test_a_mean_of_one_is_itself() -> None:
    x = torch.randn(9, 3)
    assert torch.equal(losses.alone(x), x)
