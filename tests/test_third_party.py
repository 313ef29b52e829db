"""Strangers' plugins, as strangers ship them: wheels in a fresh environment, outside of the repository."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from pvdconvert.testing.conversions import MIN_DB

PLUGINS = (Path("tests/third_party/blobs"), Path("examples/kplanes"))
REPO = Path(__file__).resolve().parents[1]
STEPS = "labels=1;density=60;color=80"

# A file to convert: a small hash grid after a few steps towards the analytic scene, written by the core.
SOURCE = """
import torch
from pvdconvert.plugin import ArrayTensor, Parts
from pvdconvert.registry import default
from pvdconvert.testing.subject import Subject, answers_of
from pvdconvert.writing import write_checked
from pathlib import Path

s = Subject("ngp")
field = s.fresh()
optimizer = torch.optim.Adam(s.code.param_groups(field))
x, d = s.occupied(8192), s.directions(8192, 1)
sigma, rgb = answers_of(s.teacher, x, d)
for step in range(150):
    optimizer.zero_grad()
    pick = torch.randint(len(x), (1024,))
    latent = field.encode(x[pick])
    alpha = torch.exp(-0.05 * field.density(latent)) - torch.exp(-0.05 * sigma[pick])
    (alpha.square().mean() + (field.color(latent, d[pick]) - rgb[pick]).square().mean()).backward()
    optimizer.step()
config, tensors = s.code.save(field)
parts = Parts("ngp", config, {k: ArrayTensor(t.detach().numpy()) for k, t in tensors.items()}, s.scene)
write_checked(parts, Path("scene.safetensors"), default().native(), default())
"""

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class Environment:
    """A virtual environment with the core's and the strangers' wheels, and a folder to work in."""

    python: Path
    site: Path
    work: Path

    def run(self, *args: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run this environment's Python in the work folder."""
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PVDCONVERT_PLUGINS", "VIRTUAL_ENV")}
        done = _run([self.python, *args], cwd=self.work, env=env)
        assert done.returncode == expect, (args, done.returncode, done.stdout[-2000:], done.stderr[-4000:])
        return done

    def cli(self, *args: str | Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pvdconvert", *args, expect=expect)


def _run(
    command: Sequence[str | Path], cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=3600, check=False
    )


def _pip(*args: str | Path) -> None:
    done = _run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *args])
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheels built and installed without a network.

    Heavy dependencies come from the environment of the tests, appended by a ``.pth`` line: such a folder's own ``.pth``
    files are not run, so an editable install in it stays out, and the wheels come first.
    """
    folder = tmp_path_factory.mktemp("stranger")
    wheels = folder / "wheels"
    for source in (REPO, *(REPO / plugin for plugin in PLUGINS)):
        _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, source)
    root = folder / "venv"
    venv.EnvBuilder(with_pip=False, symlinks=os.name != "nt").create(root)
    scripts = root / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    _pip("--python", python, "install", "--no-deps", "--no-index", *sorted(wheels.glob("*.whl")))
    told = _run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
    site = Path(told.stdout.strip())
    paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    work = folder / "work"
    work.mkdir()
    made = Environment(python, site, work)
    made.run("-c", SOURCE)
    return made


def test_the_wheels_are_what_runs(environment: Environment) -> None:
    code = (
        "import pvdconvert, pvdconvert_plugins, pvdconvert_formats, pvdconvert_blobs as b; print(pvdconvert.__file__)"
    )
    code += "\nprint(pvdconvert_plugins.__file__, pvdconvert_formats.__file__, b.__file__, sep='\\n')"
    code += "\nimport pvdconvert_kplanes; print(pvdconvert_kplanes.__file__)"
    for line in environment.run("-c", code).stdout.splitlines():
        assert Path(line).resolve().is_relative_to(environment.site.resolve()), line


@pytest.mark.parametrize(("name", "kinds"), [("blobs", 1), ("kplanes", 2)])
def test_the_plugin_is_listed_with_its_distribution(environment: Environment, name: str, kinds: int) -> None:
    plugins = json.loads(environment.cli("plugins", "--json").stdout)["plugins"]
    own = [p for p in plugins if p["name"] == name]
    assert len(own) == len({p["kind"] for p in own}) == kinds
    for p in own:
        assert (p["distribution"], p["version"], p["builtin"]) == (f"pvdconvert-{name}", "0.1.0", False)
        assert p["status"] == "ok"
    strangers = {"pvdconvert-blobs", "pvdconvert-kplanes"}
    assert all(p["builtin"] == (p["distribution"] == "pvdconvert") for p in plugins)
    assert {p["distribution"] for p in plugins} == {"pvdconvert", *strangers}
    assert len({(p["kind"], p["name"]) for p in plugins}) == len(plugins)
    assert name in environment.cli("formats").stdout


def test_to_them_and_from_them(environment: Environment) -> None:
    """A file of a built-in architecture -> a stranger's -> another stranger's -> ours again: the road of the README."""
    chain = [("ngp", "scene", None), ("blobs", "blobs", "count=32"), ("kplanes", "kplanes", "resolution=32")]
    chain.append(("ngp", "back", None))
    for (source, given, _), (name, made, setting) in itertools.pairwise(chain):
        sets = ["--set", setting] if setting else []
        asked = ["--to", name, "-o", f"{made}.safetensors", *sets, "--json", "--replay", STEPS]
        report = json.loads(environment.cli(f"{given}.safetensors", *asked).stdout)
        assert (report["source"]["architecture"], report["target"]["architecture"]) == (source, name)
        assert report["fidelity"]["psnr"] > MIN_DB
        assert name in environment.cli("inspect", f"{made}.safetensors", "--json").stdout
    left = {p.stem for p in environment.work.glob("*.safetensors*")}
    assert left == {made for _, made, _ in chain}


def test_it_passes_the_conformance_suite(environment: Environment) -> None:
    told = json.loads(environment.cli("selftest", "blobs", "--json").stdout)
    assert [c for c in told["checks"] if c["status"] == "fail"] == []
    assert len(told["checks"]) > 20


def test_kplanes_own_tests_pass_where_it_is_installed(environment: Environment) -> None:
    """The conformance suite among them. Nothing of the repository is on the path: the tests alone are copied."""
    tests = environment.work / "kplanes"
    shutil.copytree(REPO / "examples/kplanes/tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "examples/kplanes/pyproject.toml", tests)
    done = environment.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tests, tests)
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_without_it_its_files_are_named_not_guessed(environment: Environment) -> None:
    """PVDCONVERT_PLUGINS= switches strangers off: the architecture is then unusable, in one line, with its reason."""
    done = _run(
        [environment.python, "-m", "pvdconvert", "nothing.safetensors", "--to", "blobs"],
        cwd=environment.work,
        env={**os.environ, "PVDCONVERT_PLUGINS": ""},
    )
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1
    assert "PVDCONVERT_PLUGINS" in done.stderr
