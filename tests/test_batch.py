"""Batches: what a manifest may say, what is skipped, resumed and run, and that one failure takes no other row."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvdconvert import batch, batch_manifest
from pvdconvert.cli.main import run
from pvdconvert.errors import InputError, OutputError
from pvdconvert.progress import Silent
from tests.test_cli_road import write_ball

# Stands for the Python that runs a row: it does what the source file says, in milliseconds and without torch.
REAL = sys.executable
ROW = """#!{python}
import json, os, signal, sys, time
args = sys.argv[4:]  # after -m pvdconvert convert
open("calls.txt", "a").write(" ".join(args) + chr(10))
what, out = open(args[0]).read().split(), args[args.index("--out") + 1]
if what[0] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what[0] == "refuse" or what[0] == "damaged" and "--resume" in args:
    print(json.dumps({{"schema": "pvdconvert/error/1", "error": "no good", "exit_code": 3}}))
    sys.exit(3)
if what[0] == "mute":
    sys.exit(5)
if what[0] == "wait":
    def save(*_):
        os.makedirs(out + ".resume", exist_ok=True)
        sys.exit(130)
    signal.signal(signal.SIGINT, save)
    open("ready", "w").close()
    time.sleep(60)
open(out, "w").write("output of " + args[0])
print(json.dumps({{"target": {{"path": out}}, "fidelity": {{"psnr": float(what[1])}}, "peak_bytes": 7}}))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    python = tmp_path / "python"
    python.write_text(ROW.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(place: Path, *rows: str, header: str = "file") -> None:
    (place / "m.csv").write_text("\n".join([header, *rows]) + "\n")


def told(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, Any]:
    assert run(["batch", "m.csv", "--to", "ngp", "--json", "--progress", "none", *args]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def calls(place: Path) -> list[str]:
    file = place / "calls.txt"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_one_failure_takes_no_other_row(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a", "ok 30.5"), ("b", "die"), ("c", "refuse"), ("d", "mute"), ("e", "ok 31")):
        (place / name).write_text(text)
    table(place, *"abcde", "gone")
    got = told(capsys, "--jobs", "2", code=batch.FAILED)
    rows = got["rows"]
    assert [r["status"] for r in rows] == ["done", "failed", "failed", "failed", "done", "failed"]
    assert [r["exit_code"] for r in rows[:5]] == [0, 137, 3, 5, 0]
    assert [r["psnr"] for r in rows] == [30.5, None, None, None, 31.0, None]
    assert "SIGKILL" in rows[1]["error"]
    assert rows[2]["error"] == "no good"
    assert "said nothing" in rows[3]["error"]
    assert got["counts"] == {"done": 2, "skipped": 0, "failed": 4, "interrupted": 0, "waiting": 0}
    assert rows[0]["row"] == 2
    assert (place / "a-ngp.safetensors").read_text() == f"output of {place / 'a'}"


def test_what_is_done_is_not_done_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a").write_text("ok 30")
    (place / "b").write_text("refuse")
    table(place, "a,1", "b,2", header="file,seed")
    told(capsys, code=batch.FAILED)
    assert len(calls(place)) == 2
    got = told(capsys, code=batch.FAILED)
    assert [r["status"] for r in got["rows"]] == ["skipped", "failed"]
    assert got["rows"][0]["psnr"] == 30.0
    assert [c.split()[0] for c in calls(place)] == [str(place / "b")]
    (place / "b").write_text("ok 29")
    assert [r["status"] for r in told(capsys)["rows"]] == ["skipped", "done"]
    calls(place)
    # Other settings, another source or a changed output are no reason to overwrite silently.
    table(place, "a,3", "b,2", header="file,seed")
    assert "of other settings" in told(capsys, code=9)["error"]
    assert [r["status"] for r in told(capsys, "--force")["rows"]] == ["done", "skipped"]
    assert "--force" in calls(place)[0]
    (place / "a-ngp.safetensors").write_text("output of somebody else")
    assert "was changed since" in told(capsys, code=9)["error"]
    assert calls(place) == []


def test_an_output_of_a_batch_that_was_killed_is_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a").write_text("ok 30")
    table(place, "a")
    told(capsys)
    calls(place)
    state = place / "m.csv.state.jsonl"
    begun, ended = state.read_text().splitlines()
    state.write_text(begun + "\n" + ended[:40])  # killed while it wrote that the row has ended
    assert [r["status"] for r in told(capsys)["rows"]] == ["done"]
    assert "--force" in calls(place)[0]
    assert [r["status"] for r in told(capsys)["rows"]] == ["skipped"]


def test_a_file_of_somebody_else_is_in_the_way(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a").write_text("ok 30")
    (place / "a-ngp.safetensors").write_text("precious")
    table(place, "a")
    text = told(capsys, code=9)["error"]
    assert "m.csv: row 2, column 'out'" in text
    assert (place / "a-ngp.safetensors").read_text() == "precious"
    assert not (place / "m.csv.state.jsonl").exists()


def test_a_stopped_batch_saves_its_rows_and_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a").write_text("wait")
    (place / "b").write_text("ok 30")
    table(place, "a", "b")

    def stop() -> bool:
        return (place / "ready").exists()

    journal = batch.Journal(place / "m.csv.state.jsonl")
    rows = [
        batch.Row(n, place / f, "ngp", place / f"{f}-ngp.safetensors",
                  ("--to", "ngp", "--out", str(place / f"{f}-ngp.safetensors")))
        for n, f in ((2, "a"), (3, "b"))
    ]  # fmt: skip
    todo = [t for row in rows if isinstance(t := batch.decide(row, journal, force=False), batch.Todo)]
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        outcomes = list(batch.run(todo, journal, executor, progress=Silent(), stop=stop))
    assert {o.row: o.status for o in outcomes} == {2: "interrupted", 3: "waiting"}
    assert batch.exit_code(outcomes, stopped=True) == 130
    journal.close()
    calls(place)
    (place / "a").write_text("ok 33")
    os.utime(place / "a", ns=(0, json.loads((place / "m.csv.state.jsonl").read_text().splitlines()[0])["source"][1]))
    changed = told(capsys)  # the source has another size: what was kept is of no use
    assert [r["status"] for r in changed["rows"]] == ["done", "done"]
    assert "--resume" not in calls(place)[0]


@pytest.mark.parametrize(("text", "runs"), [("ok 33", 1), ("damaged 33", 2)])
def test_a_kept_state_is_taken_up_and_if_damaged_forgotten(
    text: str, runs: int, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "a").write_text(text)
    table(place, "a")
    told(capsys)
    (place / "a-ngp.safetensors").unlink()
    (place / "a-ngp.safetensors.resume").mkdir()
    calls(place)
    assert [r["status"] for r in told(capsys)["rows"]] == ["done"]
    made = calls(place)
    assert len(made) == runs
    assert "--resume" in made[0]
    assert "--resume" not in made[-1] or runs == 1


def test_ctrl_c_ends_with_130_and_leaves_no_process(place: Path) -> None:
    (place / "a").write_text("wait")
    table(place, "a")
    code = "import sys; from pvdconvert.cli.main import run; "
    code += f"sys.executable = {str(place / 'python')!r}; "
    code += "sys.exit(run(['batch', 'm.csv', '--to', 'ngp', '--progress', 'none']))"
    with subprocess.Popen([REAL, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (place / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None
        assert "the same command again" in process.stderr.read()
    assert (place / "a-ngp.safetensors.resume").is_dir()


def test_two_batches_do_not_share_a_state(tmp_path: Path) -> None:
    held = batch.Journal(tmp_path / "s")
    with pytest.raises(OutputError, match="another batch"):
        batch.Journal(tmp_path / "s")
    held.close()
    batch.Journal(tmp_path / "s").close()


# -- manifests -------------------------------------------------------------------------------------------------------


def test_csv_and_json_lines_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        "\ufefffile;to;max-mb;set;exact\r\n# a remark\r\n\r\n"
        'x.ckpt;ngp;3.5;"levels=4;mask=no";yes\r\ny.ckpt;;;;no\r\n'.encode()
    )
    (tmp_path / "b.jsonl").write_text(
        '{"file": "x.ckpt", "to": "ngp", "max_mb": 3.5, "set": {"levels": 4, "mask": "no"}, "exact": true}\n'
        '{"file": "y.ckpt", "to": null, "exact": false}\n'
    )
    a, b = (batch_manifest.read(tmp_path / n) for n in ("a.csv", "b.jsonl"))
    assert [dict(r.values) for r in a] == [dict(r.values) for r in b]
    assert a[0].values["set"] == ("levels=4", "mask=no")
    assert [r.number for r in a] == [4, 5]
    assert [r.number for r in b] == [1, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no rows"]),
        ("file\n", ["no rows"]),
        ("to\nngp\n", ["row 1", "'file'"]),
        ("file,fiel\n", ["row 1", "'fiel'", "did you mean 'file'"]),
        ("file,file\n", ["row 1", "'file'", "twice"]),
        ("file,to\na,ngp,3\n", ["row 2", "3 cells"]),
        ("file,to\n,ngp\n", ["row 2", "'file'", "empty"]),
        ("file,exact\na,perhaps\n", ["row 2", "'exact'"]),
        ('file\n"a\n', ["row 2"]),
        ("[1]", ["JSON array"]),
        ('{"file": "a"}\n{"file"', ["row 2", "JSON"]),
        ('{"file": "a"}\n3\n', ["row 2", "object"]),
        ('{"file": ["a"]}', ["row 1", "'file'"]),
        ('{"file": "a", "min-psnr": 3, "min_psnr": 4}', ["row 1", "'min_psnr'", "twice"]),
    ],
)
def test_a_bad_manifest_is_one_line(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        batch_manifest.read(path)
    said = str(caught.value)
    assert "\n" not in said
    assert all(word in said for word in ["m.csv", *words])


def test_a_manifest_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        batch_manifest.read(tmp_path / "m.csv")
    with pytest.raises(InputError, match="cannot be read"):
        batch_manifest.read(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("header", "cells", "words"),
    [
        ("file,to", "a,tensorff", ["'to'", "tensorf"]),
        ("file,preset", "a,fasst", ["'preset'", "fast"]),
        ("file,budget", "a,soon", ["'budget'", "90s"]),
        ("file,seed", "a,-1", ["'seed'"]),
        ("file,seed", "a,1.5", ["'seed'", "whole"]),
        ("file,max_mb", "a,much", ["'max_mb'"]),
        ("file,set", "a,levls=3", ["'set'", "levels"]),
        ("file,bounds", 'a,"0,0,0"', ["'bounds'"]),
        ("file,device", "a,gpu", ["'device'"]),
        ("file,as", "a,svox", ["'as'"]),
        ("file,out", "a,no/o.safetensors", ["'out'", "mkdir"]),
        ("file,out", "a,b", ["'out'", "file of row 3"]),
    ],
)
def test_a_row_that_cannot_be_stops_everything_before_it_begins(
    header: str, cells: str, words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "b").write_text("ok 30")
    table(place, cells, "b" + "," * header.count(","), header=header)
    said = told(capsys, code=3)["error"]
    assert all(word in said for word in ["m.csv", "row 2", *words]), said
    assert calls(place) == []


def test_two_rows_cannot_write_one_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table(place, "a", "b", "x/../a")
    said = told(capsys, code=3)["error"]
    assert "row 4" in said
    assert "row 2" in said


def test_a_dry_run_leaves_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "a").write_text("ok 30")
    table(place, "a")
    before = sorted(os.listdir(place))
    assert told(capsys, "--dry-run")["counts"]["waiting"] == 1
    assert sorted(os.listdir(place)) == before


# -- the real thing --------------------------------------------------------------------------------------------------


def real(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    write_ball(tmp_path / "ball.safetensors", radius=0.25)
    (tmp_path / "m.csv").write_text("file,out\nball.safetensors,one.safetensors\nm.csv,two.safetensors\n")

    def go(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pvdconvert", "batch", "m.csv", "--to", "plenoxels", "--json"]
        return subprocess.run(
            [*command, "--progress", "none", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    return go


def test_a_real_row_is_converted_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = real(tmp_path)()
    assert done.returncode == 11, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [r["status"] for r in rows] == ["done", "failed"]
    assert rows[0]["bytes"] == (tmp_path / "one.safetensors").stat().st_size
    assert rows[1]["exit_code"] in (3, 4)
    assert done.stderr.splitlines()[-1].startswith("pvdconvert: error: 1 of 2 rows failed")


@pytest.mark.slow
def test_rows_on_a_cluster(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="needs the extra cluster")
    go = real(tmp_path)
    done = go("--cluster", "local")
    assert done.returncode == 11, done.stderr
    assert [r["status"] for r in json.loads(done.stdout)["rows"]] == ["done", "failed"]
    again = go("--cluster", "local")
    assert [r["status"] for r in json.loads(again.stdout)["rows"]] == ["skipped", "failed"]


def test_a_cluster_without_its_extra_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "a").write_text("ok 30")
    table(place, "a")
    monkeypatch.setitem(sys.modules, "dask", None)
    assert "pvdconvert[cluster]" in told(capsys, "--cluster", "local", code=5)["error"]
