"""``--report``: what the suffix decides, what stands in the page of a real run, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvdconvert.cameras import sphere_cameras
from pvdconvert.cli import reporting
from pvdconvert.cli.main import run
from pvdconvert.errors import OutputError, UsageError
from pvdconvert.metrics import ReferenceViews
from pvdconvert.report.album import Album
from pvdconvert.scene import Box, Scene
from tests.test_cli_road import write_ball


def test_the_suffix_decides(tmp_path: Path) -> None:
    page, data = tmp_path / "a.HTML", tmp_path / "a.json"
    assert reporting.checked(page, force=False) is True
    assert reporting.checked(data, force=False) is False
    assert reporting.checked(None, force=False) is False
    document = {"schema": "pvdconvert/report/1", "notes": ["one"], "seconds": float("nan")}
    reporting.save(None, document)
    reporting.save(data, document)
    reporting.save(page, document)
    assert json.loads(data.read_text()) == {**document, "seconds": None}
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "<li>one</li>" in text
    with pytest.raises(OutputError, match="exists"):
        reporting.checked(page, force=False)
    with pytest.raises(UsageError, match="--report and -o name the same file"):
        reporting.checked(page, force=True, out=tmp_path / "." / "a.HTML")


def test_the_machine_is_described_and_not_named() -> None:
    told = reporting.machine()
    assert {"pvdconvert", "torch", "numpy", "python", "system", "processor", "cores"} <= set(told)
    assert told["cores"] >= 1


def test_a_replay_runs_steps_not_the_clock() -> None:
    words = ["a b.ckpt", "--to", "ngp", "--budget", "30s", "--resume", "--replay=old", "--seed", "3"]
    assert reporting.typed(words).startswith("pvdconvert 'a b.ckpt' --to ngp --budget 30s")
    assert reporting.replayed(words, "scout=1;x=2/2") == (
        "pvdconvert 'a b.ckpt' --to ngp --seed 3 --replay 'scout=1;x=2/2'"
    )
    assert reporting.replayed(["a", "--budget=5m", "--to", "ngp"], "s") == "pvdconvert a --to ngp --replay s"
    assert (reporting.replayed([], "s"), reporting.replayed(["a"], ""), reporting.typed([])) == ("", "", "")


def reference(count: int) -> tuple[ReferenceViews, list[Any]]:
    """Grey views, and others that are brighter by 1, 2, ... levels; everything is opaque at distance 2."""
    box = Box.cube(1.0)
    images = tuple(np.full((16, 16, 3), 100, np.uint8) for _ in range(count))
    solid, far = np.ones((16, 16), np.float32), np.full((16, 16), 2.0, np.float32)
    seen = [(np.full((16, 16, 3), 101 + n, np.uint8), solid, far + 0.5) for n in range(count)]
    cameras = sphere_cameras(box, count, 16, 5)
    return ReferenceViews(Scene(box), box, cameras, images, (solid,) * count, (far,) * count, 0.1, "p"), seen


def test_an_album_keeps_every_row_and_a_few_pictures() -> None:
    views, seen = reference(12)
    album = Album()
    album.keep(views, seen)
    # By hand: k levels everywhere are 20 log10(255 / k) dB; depth is off by 0.5 of a diagonal of 2 sqrt 3.
    assert [row["psnr"] for row in album.rows] == pytest.approx([20 * np.log10(255 / (k + 1)) for k in range(12)])
    assert {round(row["depth_error"], 9) for row in album.rows} == {round(0.5 / (2 * 3**0.5), 9)}
    assert album.rows[3]["name"] == "view 03"
    assert len(album.views) == 6
    assert {"view 00", "view 11"} <= {v.name for v in album.views}
    assert album.views[-1].colors["student"][0, 0, 0] == 112
    fidelity = views.measure(seen)
    assert fidelity.psnr == pytest.approx(np.mean([row["psnr"] for row in album.rows]))
    assert fidelity.views == tuple(row["psnr"] for row in album.rows)
    above = [row["psnr"] for row in album.rows if row["upper"]]
    assert fidelity.psnr_upper == pytest.approx(np.mean(above))


def test_compare_writes_a_page_whose_numbers_are_those_of_the_json(tmp_path: Path) -> None:
    write_ball(tmp_path / "a.safetensors", radius=0.25)
    write_ball(tmp_path / "b.safetensors", radius=0.27, color=1.5)
    files = ["a.safetensors", "b.safetensors", "--views", "2", "--size", "32"]
    command = [sys.executable, "-W", "error", "-m", "pvdconvert", "compare", *files, "--report", "r.html", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    found = re.search(r'id="report">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    held = json.loads(found[1])
    assert held["fidelity"] == told["fidelity"]
    assert [row["psnr"] for row in held["views"]] == told["fidelity"]["views"]
    assert page.count('<img src="data:image/') == 2 * 2 * 3  # views, sides, kinds
    assert "pvdconvert compare a.safetensors b.safetensors --views 2 --size 32 --report r.html --json" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "r.html"]


@pytest.mark.parametrize("command", ["convert", "train", "batch"])
def test_commands_that_take_a_target_are_not_mistaken_for_files(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([command, "nowhere", "--to", "ngp", "--report", "r.html"]) == 3
    assert "nowhere" in capsys.readouterr().err
