"""Documents that must not drift from the code."""

from __future__ import annotations

import importlib.util
import inspect
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pvdconvert.registry import default

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", REPO / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_formats_is_current(generator: ModuleType) -> None:
    assert generator.TARGET.read_text(encoding="utf-8") == generator.text(default()), "run: python docs/generate.py"


def test_tables_escape_their_separator(generator: ModuleType) -> None:
    assert generator.table(["a"], [["x | y"]]) == "| a |\n| --- |\n| x \\| y |"


def commands(text: str) -> list[str]:
    """The lines of all shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_ci_runs_the_commands_of_the_readme() -> None:
    ci = (REPO / ".ci" / "run").read_text()
    readme = commands((REPO / "README.md").read_text())
    tests = [line for line in readme if "pytest" in line]
    installs = [part for line in readme for part in line.split(" && ") if "pip install" in part]
    assert len(tests) == 1
    assert tests[0] in ci.splitlines()
    assert [part.replace("pip install", "pip install --quiet") for part in installs[:1]] == [
        line for line in ci.splitlines() if line.startswith(".venv/bin/pip install")
    ]


def test_contributing_lists_the_checks_of_ci() -> None:
    listed = commands((REPO / "CONTRIBUTING.md").read_text())
    for line in (REPO / ".ci" / "run").read_text().splitlines():
        if line.startswith(".venv/bin/") and "pip" not in line:
            assert line in listed


def test_links_between_documents_lead_somewhere() -> None:
    pages = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), *(REPO / "examples").glob("*.md")]
    assert len(pages) >= 6
    broken = [
        f"{page.relative_to(REPO)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert broken == []


def test_the_options_of_the_readme_exist() -> None:
    import typer.main

    from pvdconvert.cli.main import build

    group = typer.main.get_command(build())
    assert hasattr(group, "commands")
    known = {
        option for command in group.commands.values() for p in command.params for option in (*p.opts, *p.secondary_opts)
    }
    lines = [line for line in (REPO / "README.md").read_text().splitlines() if "pytest" not in line]
    used = {option for line in lines for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)}
    assert {"--to", "--preset", "--budget"} <= used
    assert used - known - {"--help"} == set()


def test_the_python_example_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the conversion itself, whose signature must fit and whose two functions must answer as they should."""
    import torch

    import pvdconvert
    from pvdconvert.pipeline import convert
    from pvdconvert.report import Report

    seen: dict[str, Any] = {}

    def check(*arguments: Any, **named: Any) -> Report:
        seen.update(inspect.signature(convert).bind(*arguments, **named).arguments)
        return Report(fidelity={"psnr": 40.0})

    monkeypatch.setattr(pvdconvert, "convert", check, raising=False)
    (code,) = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    density, color = seen["source"]
    x = torch.rand(7, 3) * 2 - 1
    assert density(x).shape == (7,)
    assert color(x, x).shape == (7, 3)
    assert seen["to"] == "tensorf"


def test_the_changelog_knows_this_version() -> None:
    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (REPO / "CHANGELOG.md").read_text()
