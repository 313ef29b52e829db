"""How a check runs and what it leaves behind."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

S = TypeVar("S")


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check: ``detail`` says what was seen, or why it failed."""

    name: str
    ok: bool
    detail: str

    @property
    def status(self) -> str:
        """ "pass" or "fail"."""
        return "pass" if self.ok else "fail"


class Failed(Exception):
    """A plugin does not keep its contract; the message says which part."""


def expect(condition: object, message: str) -> None:
    """Raise Failed with ``message`` unless ``condition``. Unlike ``assert`` it also works under ``python -O``."""
    if not condition:
        raise Failed(message)


def run(name: str, check: Callable[[S], str | None], subject: S) -> Check:
    """Run one check; whatever it raises is the detail of a failed one."""
    try:
        return Check(name, True, check(subject) or "")
    except Failed as failure:
        return Check(name, False, str(failure))
    except Exception as error:  # a plugin may raise anything: that is a finding, not a crash
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def run_all(checks: Mapping[str, Callable[[S], str | None]], make: Callable[[], S]) -> list[Check]:
    """Run ``checks`` on one subject; where the subject itself cannot be made, that is the one failed check."""
    try:
        subject = make()
    except Exception as error:
        return [Check("code", False, f"{type(error).__name__}: {' '.join(str(error).split())}")]
    return [run(name, check, subject) for name, check in checks.items()]


def expect_torch_free(*paths: str) -> None:
    """Raise Failed if importing one of the "module:name" ``paths`` in a fresh interpreter imports torch."""
    code = (
        "import importlib, sys\n"
        "for path in sys.argv[1:]:\n"
        "    module, _, name = path.partition(':')\n"
        "    getattr(importlib.import_module(module), name)\n"
        "    assert 'torch' not in sys.modules, path + ' imports torch'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.path[:] = eval(sys.argv.pop(1))\n" + code, repr(sys.path), *paths],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    expect(done.returncode == 0, (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1])


def plain(value: Any) -> Any:
    """``value`` as JSON holds it: tuples become lists."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
