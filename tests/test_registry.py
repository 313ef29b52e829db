"""The registry: built-ins first, broken and clashing plugins listed with a reason, nothing loaded too early."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from pvdconvert.errors import PluginError, UnknownError
from pvdconvert.plugin import FORMAT_GROUP, PLUGIN_GROUP, ArchitectureSpec, FormatSpec, Match
from pvdconvert.registry import Origin, Registry, default, installed, resolve

MODULE = "registry_test_code"


@dataclasses.dataclass(frozen=True)
class Options:
    size: int = dataclasses.field(default=3, metadata={"help": "how large"})


class Code:
    made = 0

    def __init__(self) -> None:
        type(self).made += 1


def probe(manifest: Any) -> Match | None:
    return Match(0.9, "by a test") if manifest == "mine" else None


def failing() -> None:
    raise RuntimeError("this code\ncannot start")


@pytest.fixture(autouse=True)
def _code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that specs can name, as a third party's would be."""
    module = types.ModuleType(MODULE)
    module.__dict__.update(Code=Code, Options=Options, probe=probe, Failing=failing)
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.delenv("PVDCONVERT_PLUGINS", raising=False)
    monkeypatch.setattr(Code, "made", 0)


def architecture(name: str, **changes: Any) -> ArchitectureSpec:
    spec = ArchitectureSpec(name, f"the {name}", code=f"{MODULE}:Code", options=f"{MODULE}:Options")
    return dataclasses.replace(spec, **changes)


def layout(name: str, **changes: Any) -> FormatSpec:
    spec = FormatSpec(name, f"the {name}", probe=f"{MODULE}:probe", code=f"{MODULE}:Code", architectures=("grid",))
    return dataclasses.replace(spec, **changes)


def origin(name: str, load: Any, dist: str = "pvdconvert", version: str = "1.0") -> Origin:
    """An entry point whose load returns ``load``, or raises it where it is an exception."""

    def loader() -> Any:
        if isinstance(load, BaseException):
            raise load
        return load

    return Origin(name, f"{dist}:{name}", dist, version, loader)


def registry(*plugins: Origin, formats: tuple[Origin, ...] = ()) -> Registry:
    given = {PLUGIN_GROUP: plugins, FORMAT_GROUP: formats}
    return Registry(lambda group: given[group])


GRID = origin("grid", architecture("grid"))


def third(name: str, dist: str = "acme-fields", version: str = "2.1", **changes: Any) -> Origin:
    return origin(name, architecture(name, **changes), dist, version)


def test_a_usable_plugin_is_listed_and_its_code_made_once_on_first_use() -> None:
    r = registry(GRID, third("splats"))
    assert list(r.architectures()) == ["grid", "splats"]
    assert r.architectures()["splats"].spec.title == "the splats"
    assert str(r.architectures()["splats"].origin) == "acme-fields 2.1"
    assert [e.origin.builtin for e in r.architectures().values()] == [True, False]
    assert r.options("splats") is Options
    assert Code.made == 0
    assert r.architecture("splats") is r.architecture("splats")
    assert Code.made == 1
    assert r.problems() == []


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (ImportError("No module named 'splatlib'"), "ImportError: No module named 'splatlib'"),
        (SyntaxError("two\nlines"), "SyntaxError: two lines"),
        (AttributeError("module has no SPEC"), "AttributeError: module has no SPEC"),
        (architecture("splats", api_version=99), "made for plugin API 99, this is 1"),
        (architecture("splits"), "entry point 'splats' announces the name 'splits'"),
        (layout("splats"), "acme-fields:splats is not a ArchitectureSpec"),
        (None, "acme-fields:splats is not a ArchitectureSpec"),
    ],
)
def test_a_broken_plugin_is_a_problem_with_a_reason_and_breaks_nothing_else(load: Any, reason: str) -> None:
    r = registry(GRID, origin("splats", load, "acme-fields", "2.1"))
    assert list(r.architectures()) == ["grid"]
    (problem,) = r.problems()
    assert (problem.group, problem.name, problem.reason) == (PLUGIN_GROUP, "splats", reason)
    with pytest.raises(PluginError, match=f"'splats' of acme-fields 2.1 cannot be used: {re.escape(reason)}") as caught:
        r.architecture("splats")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 5
    assert isinstance(r.architecture("grid"), Code)


def test_a_clash_of_two_third_parties_disables_both_and_names_both() -> None:
    r = registry(GRID, third("splats", "acme-fields", "2.1"), third("splats", "zeta", "0.3"))
    assert list(r.architectures()) == ["grid"]
    problems = r.problems()
    assert [p.origin.dist for p in problems] == ["acme-fields", "zeta"]
    assert all("name clash between acme-fields 2.1 and zeta 0.3" in p.reason for p in problems)
    with pytest.raises(PluginError, match=r"acme-fields 2\.1 and zeta 0\.3: uninstall one, or set PVDCONVERT_PLUGINS"):
        r.architecture("splats")


def test_a_clash_of_three_names_all_three() -> None:
    r = registry(third("splats", "a", "1"), third("splats", "b", "2"), third("splats", "c", "3"))
    assert r.architectures() == {}
    assert all("between a 1 and b 2 and c 3" in p.reason for p in r.problems())
    assert len(r.problems()) == 3


def test_a_builtin_cannot_be_shadowed_and_the_clash_is_told() -> None:
    r = registry(GRID, third("grid"))
    assert r.architectures()["grid"].origin.builtin
    assert isinstance(r.architecture("grid"), Code)
    (problem,) = r.problems()
    assert problem.origin.dist == "acme-fields"
    assert "name clash between pvdconvert 1.0 and acme-fields 2.1" in problem.reason


def test_a_builtin_wins_even_if_it_is_listed_last() -> None:
    r = registry(third("grid"), GRID)
    assert r.architectures()["grid"].origin.builtin
    assert [p.origin.dist for p in r.problems()] == ["acme-fields"]


def test_a_broken_plugin_does_not_hide_that_another_has_its_name() -> None:
    """The usable one is used; the broken one stays listed."""
    r = registry(origin("splats", ImportError("gone"), "acme-fields", "2.1"), third("splats", "zeta", "0.3"))
    assert r.architectures()["splats"].origin.dist == "zeta"
    assert [p.reason for p in r.problems()] == ["ImportError: gone"]
    assert isinstance(r.architecture("splats"), Code)


@pytest.mark.parametrize(
    ("limit", "usable"),
    [
        (None, ["grid", "splats", "waves"]),
        ("", ["grid"]),
        (" , ", ["grid"]),
        ("acme-fields", ["grid", "splats"]),
        ("waves", ["grid", "waves"]),
        ("splats, zeta", ["grid", "splats", "waves"]),
        ("grid", ["grid"]),
    ],
)
def test_the_environment_limits_third_parties(
    monkeypatch: pytest.MonkeyPatch, limit: str | None, usable: list[str]
) -> None:
    if limit is not None:
        monkeypatch.setenv("PVDCONVERT_PLUGINS", limit)
    r = registry(GRID, third("splats"), third("waves", "zeta"))
    assert list(r.architectures()) == usable
    assert r.names(PLUGIN_GROUP) == usable
    assert {p.name for p in r.problems()} == {"splats", "waves"} - set(usable)
    assert all(p.reason == "disabled by PVDCONVERT_PLUGINS" for p in r.problems())


def test_a_disabled_plugin_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVDCONVERT_PLUGINS", "")
    r = registry(GRID, origin("splats", KeyboardInterrupt(), "acme-fields"))
    with pytest.raises(PluginError, match="disabled by PVDCONVERT_PLUGINS"):
        r.architecture("splats")


def test_disabling_one_of_a_clash_resolves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PVDCONVERT_PLUGINS", "zeta")
    r = registry(third("splats"), third("splats", "zeta", "0.3"))
    assert r.architectures()["splats"].origin.dist == "zeta"


@pytest.mark.parametrize(
    ("asked", "suggested"), [("spalts", "did you mean 'splats'?"), ("gird", "did you mean 'grid'?"), ("xyz", None)]
)
def test_an_unknown_name_lists_what_is_known(asked: str, suggested: str | None) -> None:
    r = registry(GRID, third("splats"))
    with pytest.raises(UnknownError, match=f"unknown architecture '{asked}'; known: grid, splats") as caught:
        r.architecture(asked)
    assert caught.value.exit_code == 4
    assert (suggested or "did you mean") in str(caught.value) or suggested is None
    assert suggested is not None or "did you mean" not in str(caught.value)


def test_names_are_listed_without_loading_anything() -> None:
    r = registry(GRID, origin("splats", KeyboardInterrupt(), "acme-fields"))
    assert r.names(PLUGIN_GROUP) == ["grid", "splats"]


def test_a_missing_requirement_names_the_command_that_installs_it() -> None:
    needs = (("a_module_that_is_not_there", "pip install acme-fields[fast]"),)
    r = registry(third("splats", needs=needs))
    with pytest.raises(PluginError, match=r"needs 'a_module_that_is_not_there'.*\(pip install acme-fields\[fast\]\)"):
        r.architecture("splats")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (f"{MODULE}:Failing", "failed to import: RuntimeError: this code cannot start"),
        (f"{MODULE}:Missing", "failed to import: AttributeError"),
        ("no_such_module:Code", "failed to import: ModuleNotFoundError"),
    ],
)
def test_code_that_cannot_be_made_is_a_plugin_error(code: str, message: str) -> None:
    r = registry(third("splats", code=code))
    with pytest.raises(PluginError, match=message) as caught:
        r.architecture("splats")
    assert "acme-fields 2.1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_cannot_be_imported_are_a_plugin_error() -> None:
    r = registry(third("splats", options="no_such_module:Options"))
    with pytest.raises(PluginError, match=r"'splats' of acme-fields 2\.1: its options failed to import"):
        r.options("splats")


def test_probes_cover_every_readable_format_and_load_late() -> None:
    r = registry(
        formats=(
            origin("mine", layout("mine")),
            origin("writer", layout("writer", can_read=False, can_write=True)),
            origin("late", layout("late", probe="no_such_module:probe")),
        )
    )
    probes = dict(r.probes())
    assert list(probes) == ["mine", "late"]
    assert probes["mine"]("mine") == Match(0.9, "by a test")
    assert probes["mine"]("other") is None
    with pytest.raises(ModuleNotFoundError):
        probes["late"]("mine")


def test_the_native_format_is_the_one_that_says_so() -> None:
    assert registry(formats=(origin("a", layout("a")), origin("b", layout("b", native=True)))).native() == "b"
    with pytest.raises(PluginError, match="no native output format is installed"):
        registry(formats=(origin("a", layout("a")),)).native()


class Point:
    """A stand-in for importlib.metadata.EntryPoint."""

    def __init__(self, name: str, dist: str | None, version: str = "1.0") -> None:
        self.name, self.value = name, f"{dist}:{name}"
        self.dist = types.SimpleNamespace(name=dist, version=version) if dist else None

    def load(self) -> Any:
        return architecture(self.name)


@pytest.mark.parametrize("order", [lambda p: p, lambda p: p[::-1]])
def test_the_order_does_not_depend_on_the_installation(
    monkeypatch: pytest.MonkeyPatch, order: Callable[[list[Point]], list[Point]]
) -> None:
    points = [
        Point("b", "zeta"),
        Point("a", "zeta"),
        Point("z", "pvdconvert"),
        Point("c", "Acme_Fields"),
        Point("n", None),
    ]
    # The same distribution found twice on the path (an editable install beside a wheel) is no clash.
    points.append(Point("z", "pvdconvert"))
    found = order(points)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    assert [(o.dist, o.name) for o in installed(PLUGIN_GROUP)] == [
        ("pvdconvert", "z"),
        ("acme-fields", "c"),
        ("unknown", "n"),
        ("zeta", "a"),
        ("zeta", "b"),
    ]
    assert list(Registry(installed).architectures()) == ["z", "c", "n", "a", "b"]


def test_the_installed_builtins_are_usable() -> None:
    r = default()
    assert {"nerf", "ngp", "plenoxels", "tensorf"} <= {n for n, e in r.architectures().items() if e.origin.builtin}
    assert [p for p in r.problems() if p.origin.builtin] == []
    assert r.native() == "pvdconvert"
    for name in r.architectures():
        options = r.options(name)
        assert all(f.metadata.get("help") for f in dataclasses.fields(options)), f"{name}: a key without help"


def test_resolve_finds_nested_modules() -> None:
    assert resolve("pvdconvert.registry:Registry") is Registry
