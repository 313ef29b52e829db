"""The rules of the house: who may import whom, the torch-free road, sizes, and what may be in the repository."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[1]
CORE, PLUGINS, FORMATS = REPO / "pvdconvert", REPO / "plugins/pvdconvert_plugins", REPO / "formats/pvdconvert_formats"

# Room -> the rooms that it may import at run time; OPEN ones are open to all. Imports for type checkers only
# are free, but for the command line and the built-ins. "*" is every room of the core except cli; "a.b" is one module.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "stopwatch": set(),
    "lens": set(),
    "cameras": {"lens"},
    "scene": {"cameras"},
    "data": {"cameras", "containers", "lens", "plugin", "scene"},
    "plugin": {"scene", "field"},
    "registry": {"plugin"},
    "containers": {"plugin"},
    "resemblance": {"containers", "plugin"},
    "identify": {"containers", "plugin", "registry", "resemblance"},
    "field": {"nn", "render.occupancy"},
    "kernels": {"scene"},
    "nn": {"kernels", "scene"},
    "solve": {"kernels"},
    "render": {"field", "scene", "cameras", "kernels"},
    "metrics": {"containers", "render", "scene", "cameras", "field"},
    "report": {"metrics", "render", "writing"},
    "distill": {
        "ranks",
        "field",
        "scene",
        "cameras",
        "render",
        "metrics",
        "plugin",
        "solve",
        "kernels",
        "report",
        "settings",
        "data",
        "nn",
    },
    "settings": {"distill.methods", "plugin", "scene"},
    "prepare": {"field", "metrics", "render", "scene", "cameras"},
    "looking": {"distill", "field", "metrics", "prepare", "render"},
    "loading": {"field", "identify", "plugin", "registry", "scene"},
    "writing": {"containers", "plugin", "registry"},
    "transcode": {"plugin", "registry", "writing"},
    "asking": {"distill", "memory", "prepare", "render", "report", "scene"},
    "placing": {"data", "plugin", "registry", "scene"},
    "evaluation": {"cameras", "data", "metrics", "placing", "prepare", "render", "scene"},
    "memory": set(),
    "reality": {
        "data",
        "distill",
        "evaluation",
        "field",
        "loading",
        "placing",
        "plugin",
        "prepare",
        "registry",
        "render",
        "report",
        "scouting",
    },
    "batch": set(),
    "ranks": set(),
    "launch": set(),
    "batch_manifest": set(),
    "cluster": {"batch"},
    "conversion": {"*"},
    "scouting": {"distill", "field", "loading", "plugin", "render", "report", "scene", "settings"},
    "training": {"*"},
    "relay": {"loading", "plugin", "report"},
    "pipeline": {"*"},
    "viewer": {"cameras", "field", "metrics", "prepare", "render", "scene"},
    "testing": {"*"},
    "cli": {"*", "cli"},
    "__init__": {"pipeline"},
    "__main__": {"cli"},
    "pvdconvert_plugins": {"field", "scene", "plugin", "nn", "solve", "kernels", "render.occupancy"},
    "pvdconvert_formats": {"containers", "scene", "plugin", "cameras"},
}
OPEN = {"errors", "progress", "stopwatch", "version"}

# Words of the core that happen to be the name of a format.
HOMONYMS = {
    "pvd": re.compile(r"distill/methods\.py"),  # the method of the paper
    "torch-ngp": re.compile(r"(kernels|nn)/hashgrid\w*\.py"),  # an index rule of hash grids
    "nerfstudio": re.compile(r"(kernels|nn)/hashgrid\w*\.py"),  # likewise
}


def modules(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*.py") if "__pycache__" not in p.parts)


ALL = [*modules(CORE), *modules(PLUGINS), *modules(FORMATS)]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    """The room of a file: the first name below the core, or the package of the built-ins."""
    if path.is_relative_to(CORE):
        return path.relative_to(CORE).parts[0].removesuffix(".py")
    return path.parent.name


def short(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """(dotted name, for type checkers only, line) of every import in a file, wherever it stands."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}:{node.lineno}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in typing_only, node.lineno


def test_every_room_is_in_the_table() -> None:
    rooms = {room(p) for p in ALL}
    assert rooms <= set(MAY_IMPORT), f"say in MAY_IMPORT what these may import: {sorted(rooms - set(MAY_IMPORT))}"


@pytest.mark.parametrize("name", sorted(MAY_IMPORT))
def test_rooms_import_only_what_they_may(name: str) -> None:
    bad = []
    for path in ALL:
        if room(path) != name:
            continue
        for target, typing_only, line in imports(path):
            package, _, rest = target.partition(".")
            first = rest.split(".")[0]
            if package != "pvdconvert" or not rest or first == "__version__" or typing_only:
                continue
            allowed = MAY_IMPORT[name] | OPEN | {name}
            if "*" in allowed and first != "cli":
                continue
            if first not in allowed and ".".join(rest.split(".")[:2]) not in allowed:
                bad.append(f"{short(path)}:{line}: {name} imports {target}")
    assert not bad, "\n".join(bad)


def test_only_the_command_line_draws() -> None:
    bad = [
        f"{short(path)}:{line}: {target}"
        for path in ALL
        if room(path) != "cli"
        for target, _, line in imports(path)
        if target.split(".")[0] in {"typer", "rich", "click"} or target.startswith("pvdconvert.cli")
    ]
    assert [b for b in bad if not b.startswith("pvdconvert/__main__.py")] == []


def test_the_core_imports_no_builtin() -> None:
    bad = [
        f"{short(path)}:{line}: {target}"
        for path in modules(CORE)
        for target, _, line in imports(path)
        if target.split(".")[0] in {"pvdconvert_plugins", "pvdconvert_formats"}
    ]
    assert bad == []


def builtin_names() -> set[str]:
    points = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"]
    return {name for group in points.values() for name in group} - {"pvdconvert"}


def test_the_core_names_no_builtin() -> None:
    """No string of the core equals the name of a built-in architecture or format, but for cli (help) and testing."""
    names, bad = builtin_names(), []
    assert {"nerf", "ngp", "tensorf", "plenoxels"} <= names
    for path in modules(CORE):
        if room(path) in {"cli", "testing"}:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Constant) and node.value in names:
                word = HOMONYMS.get(node.value)
                if word is None or not word.search(short(path)):
                    bad.append(f"{short(path)}:{node.lineno}: {node.value!r}")
    assert not bad, "\n".join(bad)


def test_library_code_neither_prints_nor_exits() -> None:
    bad = []
    for path in ALL:
        if room(path) in {"cli", "__main__"}:
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in {"print", "exit", "quit", "sys.exit", "os._exit", "input"}:
                    bad.append(f"{short(path)}:{node.lineno}: {called}()")
            elif isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc):
                bad.append(f"{short(path)}:{node.lineno}: SystemExit")
    assert bad == []


def test_file_sizes() -> None:
    limits = [(CORE, 400), (PLUGINS, 300), (FORMATS, 300), (REPO / "tests", 600), (REPO / "examples", 400)]
    limits += [(REPO / "benchmarks", 400)]
    bad = [
        f"{short(path)}: {lines} lines, at most {limit}"
        for root, limit in limits
        for path in modules(root)
        if (lines := path.read_text(encoding="utf-8").count("\n")) > limit
    ]
    assert not bad, "\n".join(bad)


# ---------------------------------------------------------------------------------------------- torch-free road

BLOCK = """
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numba"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


def without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter in which neither torch nor numba can be imported."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK + code], capture_output=True, text=True, timeout=120, check=False
    )


def declared_torch_free() -> list[str]:
    """Modules whose docstring says so, and those that a listing, a probe or a refusal runs through."""
    always = re.compile(r"pvdconvert/(errors|scene|cameras|plugin|registry|progress|identify|containers/.*)\.py$")
    says = re.compile(r"imports? no torch|torch-free|no torch|without torch", re.IGNORECASE)
    found = []
    for path in ALL:
        base = path.relative_to(CORE.parent if path.is_relative_to(CORE) else path.parent.parent)
        light = always.search(short(path)) or path.name.endswith("_spec.py")
        if light or says.search(ast.get_docstring(tree(path)) or ""):
            found.append(".".join(base.with_suffix("").parts).removesuffix(".__init__"))
    return found


def test_the_blocker_blocks() -> None:
    assert "torch is blocked" in without_torch("import torch").stderr


def test_torch_free_modules_import_without_torch() -> None:
    names = declared_torch_free()
    assert len(names) > 10
    done = without_torch(
        f"""
bad = []
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        bad.append(f"{{name}}: {{error}}")
print(chr(10).join(bad))
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_listing_what_is_installed_needs_no_torch() -> None:
    done = without_torch(
        """
import pvdconvert
from pvdconvert.plugin import option_help
from pvdconvert.registry import default
r = default()
print(*sorted(r.architectures()), "|", *sorted(r.formats()), "|", r.native())
for name in r.architectures():
    assert list(option_help(r.options(name))), name
for name, probe in r.probes():
    assert callable(probe)
for entry in r.formats().values():
    module, _, name = entry.spec.probe.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
assert not r.problems(), r.problems()
"""
    )
    assert done.returncode == 0, done.stderr
    architectures, formats, native = done.stdout.strip().split(" | ")
    assert set(architectures.split()) | set(formats.split()) == builtin_names() | {"pvdconvert"}
    assert native == "pvdconvert"


@pytest.mark.parametrize("arguments", [["--help"], ["formats"], ["formats", "--json"], ["plugins"], ["--version"]])
def test_listing_commands_need_no_torch(arguments: list[str]) -> None:
    done = without_torch(f"sys.argv = ['pvdconvert', *{arguments!r}]\nfrom pvdconvert.cli.main import run\nrun()")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


# ---------------------------------------------------------------------------------------------- the repository


def tracked() -> list[Path]:
    """Files under version control; all files that are not build products where git is not at hand."""
    if (REPO / ".git").exists():
        out = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
        return [REPO / name for name in out.split("\0") if name and (REPO / name).is_file()]
    hidden = re.compile(r"^(\.|build$|dist$|venv$|out$)|__pycache__|\.egg-info$")
    return [p for p in REPO.rglob("*") if p.is_file() and not any(hidden.search(q) for q in p.relative_to(REPO).parts)]


def is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def test_files_are_small_and_binaries_are_our_own() -> None:
    large = [short(p) for p in tracked() if p.stat().st_size > 4_000_000]
    assert large == []
    binary = [short(p) for p in tracked() if is_binary(p)]
    assert [b for b in binary if not re.fullmatch(r"(examples|docs)/[\w-]+\.(ckpt|png)", b)] == []


def test_no_file_names_a_machine_or_a_registry_host() -> None:
    words = ["py" + "pi.org", "python" + "hosted.org", "/wo" + "rk/", "/ro" + "ot/", "/opt/" + "py" + "pi"]
    words += ["bash" + "_jobs", "extra-index" + "-url"]
    found = [
        f"{short(path)}: {word}"
        for path in tracked()
        if not is_binary(path)
        for word in words
        if word in path.read_text(encoding="utf-8")
    ]
    assert found == []


def test_every_package_is_typed_and_shipped() -> None:
    project: dict[str, Any] = tomllib.loads((REPO / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == ["pvdconvert", "plugins/pvdconvert_plugins", "formats/pvdconvert_formats"]
    assert all((REPO / p / "py.typed").is_file() for p in packages)
    assert importlib.metadata.version("pvdconvert") == project["project"]["version"]
