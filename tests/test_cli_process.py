"""The command line as a process: exit codes, one-line errors, what goes to which stream, completion, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pvdconvert.cli.main import COMMANDS


def cli(
    *args: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None, blocked: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the command line. ``blocked``: any import of torch raises, so what passes is torch-free."""
    code = "import sys\n" + ("sys.modules['torch'] = None\n" if blocked else "")
    code += "from pvdconvert.cli.main import run\nsys.exit(run(sys.argv[1:]))"
    full = {**os.environ, **(env or {})}
    for name in ("FORCE_COLOR", "NO_COLOR", "PVDCONVERT_PLUGINS"):
        if name not in (env or {}):
            full.pop(name, None)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        cwd=cwd,
        env=full,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """Assert that ``done`` failed with ``code``, one line on stderr that holds ``words``, and nothing on stdout."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pvdconvert: error: ")
    for word in words:
        assert word in lines[0]
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_without_torch(command: str) -> None:
    done = cli(command, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert command in done.stdout


def test_help_names_every_command_and_bare_is_a_usage_error() -> None:
    told, bare = cli("--help"), cli()
    assert told.returncode == 0
    assert bare.returncode == 2
    assert bare.stdout == told.stdout
    for command in COMMANDS:
        assert f"\n  {command} " in told.stdout


def test_version_and_module_entry(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pvdconvert", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith("pvdconvert 0.")
    assert "torch" in done.stdout


@pytest.mark.parametrize(
    "args",
    [
        ["missing.pt", "--to", "nerf"],
        ["--to", "nerf", "missing.pt"],
        ["--to=nerf", "missing.pt"],
        ["-t", "nerf", "missing.pt"],
        ["-o", "out.x", "missing.pt", "--to", "nerf"],
        ["convert", "missing.pt", "--to", "nerf"],
        ["convert", "--to", "nerf", "missing.pt"],
        ["./formats", "--to", "nerf"],
    ],
)
def test_every_spelling_of_the_default_command_reaches_convert(args: list[str], tmp_path: Path) -> None:
    refused(cli(*args, cwd=tmp_path), 3, "no such file or folder")


def test_a_mistyped_command_is_not_taken_for_a_file(tmp_path: Path) -> None:
    refused(cli("formts", cwd=tmp_path), 2, "no file or command 'formts'", "did you mean the command 'formats'?")
    (tmp_path / "formts").write_bytes(b"a file of that name")
    refused(cli("formts", cwd=tmp_path), 2, "--to is missing")


def test_a_file_named_like_a_command_needs_a_dot_slash(tmp_path: Path) -> None:
    (tmp_path / "formats").write_bytes(b"not a checkpoint")
    refused(cli("formats", "--to", "nerf", cwd=tmp_path), 2, "pvdconvert ./formats --to")


def test_usage_errors_say_where_help_is(tmp_path: Path) -> None:
    refused(cli("formats", "--jsn"), 2, "--jsn", "pvdconvert formats --help")
    refused(cli("inspect"), 2, "FILE", "pvdconvert inspect --help")
    refused(cli("x.pt", "--to", cwd=tmp_path), 2, "--to", "--help")


def test_missing_to_lists_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"x")
    refused(cli("a.pt", cwd=tmp_path), 2, "--to is missing", "nerf|")


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--to", "tensorff"], 4, ["unknown architecture 'tensorff'", "did you mean 'tensorf'"]),
        (["--to", "torch-ngp"], 4, ["file layout", "--to ngp --as torch-ngp"]),
        (["--to", "nerf", "--from", "torchngp"], 4, ["unknown format", "did you mean 'torch-ngp'"]),
        (["--to", "nerf", "--from", "nerf"], 4, ["an architecture, not a file layout"]),
        (["--to", "nerf", "--as", "nope"], 4, ["unknown format"]),
        (["--to", "nerf", "--set", "depht=3"], 2, ["no key 'depht'", "did you mean 'depth'"]),
        (["--to", "nerf", "--set", "depth"], 2, ["expected KEY=VALUE"]),
        (["--to", "nerf", "--set", "depth=deep"], 2, ["depth takes int"]),
        (["--to", "nerf", "-o", "-"], 2, ["not written to stdout"]),
        (["--to", "nerf", "-o", "nowhere/out.safetensors"], 9, ["no such folder", "mkdir -p nowhere"]),
        (["--to", "nerf", "-o", "."], 9, ["is a folder"]),
        (["--to", "nerf", "-o", "old.safetensors"], 9, ["exists", "--force"]),
        (["--to", "nerf", "-o", "in.pt", "--force"], 9, ["is the input itself"]),
        (["--to", "nerf", "--report", "old.safetensors"], 9, ["exists"]),
        (["--to", "nerf", "-o", "new.x", "--report", "new.x"], 2, ["name the same file"]),
        (["--to", "nerf", "--preset", "fats"], 2, ["--preset", "did you mean 'fast'"]),
        (["--to", "nerf", "--budget", "soon"], 2, ["not a duration", "5m"]),
        (["--to", "nerf", "--max-mb", "0"], 2, ["--max-mb"]),
        (["--to", "nerf", "--min-psnr", "nan"], 2, ["--min-psnr"]),
        (["--to", "nerf", "--bounds", "1,2,3"], 2, ["expected 6 numbers"]),
        (["--to", "nerf", "--bounds", "1,1,1,-1,-1,-1"], 2, ["empty"]),
        (["--to", "nerf", "--background", "255,0,0"], 2, ["outside of 0..1"]),
        (["--to", "nerf", "--near", "3", "--far", "2"], 2, ["not before"]),
        (["--to", "nerf", "--device", "gpu"], 2, ["--device gpu", "cuda:N"]),
        (["--to", "nerf", "--device", "cuda", "--backend", "numba"], 2, ["runs on the CPU only"]),
        (["--to", "nerf", "--progress", "bra"], 2, ["--progress", "did you mean 'bar'"]),
        (["--to", "nerf", "-q", "-v"], 2, ["contradict"]),
        (["--to", "nerf", "--dry-run", "--resume"], 2, ["contradict"]),
        (["--to", "nerf", "--config", "none.json"], 3, ["no such file"]),
        (["--to", "nerf", "--cameras", "none.json"], 3, ["none.json"]),
    ],
)
def test_bad_requests_are_refused_before_any_work(args: list[str], code: int, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.pt").write_bytes(b"never looked into")
    (tmp_path / "old.safetensors").write_bytes(b"kept")
    before = sorted(os.listdir(tmp_path))
    refused(cli("in.pt", *args, cwd=tmp_path), code, *words)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "old.safetensors").read_bytes() == b"kept"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_an_unwritable_folder_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "in.pt").write_bytes(b"x")
    folder = Path("/proc/self") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() != 0:
        folder.mkdir(mode=0o500)
    if not folder.is_dir():
        pytest.skip("no folder here that root cannot write")
    refused(cli("in.pt", "--to", "nerf", "-o", folder / "out.x", cwd=tmp_path), 9, "cannot be written")


def test_bad_files_are_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "random.pt").write_bytes(bytes(range(256)) * 64)
    for command in (["inspect"], ["convert", "--to", "nerf"]):
        refused(cli(*command, "empty.pt", cwd=tmp_path), 3, "empty.pt")
        refused(cli(*command, "emtpy.pt", cwd=tmp_path), 3, "no such file", "did you mean 'empty.pt'")
        done = cli(*command, "random.pt", cwd=tmp_path)
        assert done.returncode in (3, 4), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "random.pt" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["empty.pt", "random.pt"]


def test_json_errors_are_one_document_and_one_line(tmp_path: Path) -> None:
    for args, code in ((["inspect", "none.pt", "--json"], 3), (["formats", "--json", "--oops"], 2)):
        done = cli(*args, cwd=tmp_path)
        document = json.loads(done.stdout)
        assert done.returncode == code
        assert document["schema"] == "pvdconvert/error/1"
        assert document["exit_code"] == code
        assert done.stderr == f"pvdconvert: error: {document['error']}\n"


def test_listings_are_torch_free_and_plain() -> None:
    for command in ("formats", "plugins"):
        done = cli(command, env={"FORCE_COLOR": ""})
        assert done.returncode == 0
        assert "nerf" in done.stdout
        assert "\033" not in done.stdout
        json.loads(cli(command, "--json").stdout)


def test_formats_name_lists_the_keys_of_set() -> None:
    done = cli("formats", "nerf", "--json")
    (row,) = json.loads(done.stdout)["architectures"]
    assert "depth" in [option["name"] for option in row["options"]]
    assert "depth" in cli("formats", "nerf").stdout
    refused(cli("formats", "nrf"), 4, "did you mean 'nerf'")


def test_colour_only_where_it_is_wanted() -> None:
    assert "\033[" in cli("formats", env={"FORCE_COLOR": "1"}).stdout
    assert "\033[" not in cli("formats", env={"FORCE_COLOR": "1", "NO_COLOR": "1"}).stdout


def test_a_closed_pipe_is_not_an_error() -> None:
    code = "import sys; from pvdconvert.cli.main import run; sys.exit(run(['formats', '--json']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pvdconvert", "formats"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 9
    assert done.stderr.splitlines() == ["pvdconvert: error: cannot be written: No space left on device"]


def test_selftest_of_an_unknown_name() -> None:
    refused(cli("selftest", "tensrf"), 4, "did you mean 'tensorf'")


def complete(line: str, cwd: Path) -> list[str]:
    """What bash would offer at the end of ``line``; torch must not be needed."""
    words = line.split()
    index = len(words) if line.endswith(" ") else len(words) - 1
    env = {"_PVDCONVERT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(index)}
    done = cli(env=env, cwd=cwd)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_offers_names_without_loading_anything(tmp_path: Path) -> None:
    assert complete("pvdconvert fo", tmp_path) == ["formats"]
    assert set(complete("pvdconvert ", tmp_path)) >= set(COMMANDS)
    assert complete("pvdconvert a.pt --to tensorf-", tmp_path) == ["tensorf-cp"]
    assert {"nerf", "ngp", "tensorf", "plenoxels"} <= set(complete("pvdconvert convert a.pt --to ", tmp_path))
    assert "torch-ngp" in complete("pvdconvert a.pt --to ngp --as t", tmp_path)
    assert "bmild" in complete("pvdconvert inspect a.pt --from b", tmp_path)
    assert complete("pvdconvert a.pt --preset ba", tmp_path) == ["balanced"]
    assert "--budget" in complete("pvdconvert a.pt --b", tmp_path)
    (tmp_path / "fog.ckpt").touch()
    assert complete("pvdconvert fo", tmp_path) == ["formats", "fog.ckpt"]
