"""A stranger's plugin, as strangers ship it: two wheels in a fresh environment, outside of the repository."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

from pvdconvert.testing.conversions import MIN_DB

PLUGIN = Path("tests/third_party/blobs")
STEPS = "labels=1;density=80;color=120"

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
    """A virtual environment with both wheels, and a folder to work in."""

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
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=900, check=False
    )


def _pip(*args: str | Path) -> None:
    done = _run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *args])
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Both wheels built and installed without a network.

    Heavy dependencies come from the environment of the tests, appended by a ``.pth`` line: such a folder's own ``.pth``
    files are not run, so an editable install in it stays out, and the wheels come first.
    """
    repo = Path(__file__).resolve().parents[1]
    folder = tmp_path_factory.mktemp("stranger")
    wheels = folder / "wheels"
    for source in (repo, repo / PLUGIN):
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
    return Environment(python, site, work)


def test_the_wheels_are_what_runs(environment: Environment) -> None:
    code = (
        "import pvdconvert, pvdconvert_plugins, pvdconvert_formats, pvdconvert_blobs as b; print(pvdconvert.__file__)"
    )
    code += "\nprint(pvdconvert_plugins.__file__, pvdconvert_formats.__file__, b.__file__, sep='\\n')"
    for line in environment.run("-c", code).stdout.splitlines():
        assert Path(line).resolve().is_relative_to(environment.site.resolve()), line


def test_the_plugin_is_listed_with_its_distribution(environment: Environment) -> None:
    plugins = json.loads(environment.cli("plugins", "--json").stdout)["plugins"]
    (blobs,) = [p for p in plugins if p["name"] == "blobs"]
    assert (blobs["distribution"], blobs["version"], blobs["builtin"]) == ("pvdconvert-blobs", "0.1.0", False)
    assert blobs["status"] == "ok"
    assert all(p["builtin"] and p["distribution"] == "pvdconvert" for p in plugins if p is not blobs)
    assert len({(p["kind"], p["name"]) for p in plugins}) == len(plugins)
    assert "blobs" in environment.cli("formats").stdout


def test_to_it_and_from_it(environment: Environment) -> None:
    """A file of a built-in architecture -> blobs -> another file: the road of the README, with a stranger's plugin."""
    environment.run("-c", SOURCE)
    environment.cli(
        "scene.safetensors", "--to", "blobs", "-o", "blobs.safetensors", "--set", "count=32", "--replay", STEPS
    )
    told = json.loads(environment.cli("inspect", "blobs.safetensors", "--json").stdout)
    assert "blobs" in json.dumps(told)
    done = environment.cli("blobs.safetensors", "--to", "ngp", "-o", "back.safetensors", "--json", "--replay", STEPS)
    report = json.loads(done.stdout)
    assert report["source"]["architecture"] == "blobs"
    assert report["target"]["architecture"] == "ngp"
    assert report["fidelity"]["psnr"] > MIN_DB
    assert sorted(p.name for p in environment.work.glob("*.safetensors")) == [
        "back.safetensors",
        "blobs.safetensors",
        "scene.safetensors",
    ]


def test_it_passes_the_conformance_suite(environment: Environment) -> None:
    told = json.loads(environment.cli("selftest", "blobs", "--json").stdout)
    assert [c for c in told["checks"] if c["status"] == "fail"] == []
    assert len(told["checks"]) > 20


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
