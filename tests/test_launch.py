"""What is said before torch is imported, unless the user has said it."""

from __future__ import annotations

import os
import subprocess
import sys

from pvdconvert import launch

PAGES = "THP_MEM_ALLOC_ENABLE"


def test_what_the_user_says_stays() -> None:
    said: dict[str, str] = {}
    launch.prepare(said)
    assert said == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": launch.SPINS, PAGES: "1"}
    again = dict(said)
    launch.prepare(again)
    assert again == said
    for theirs in ({"OMP_WAIT_POLICY": "ACTIVE", PAGES: "0"}, {"OMP_WAIT_POLICY": "PASSIVE", PAGES: "1"}):
        environ = dict(theirs)
        launch.prepare(environ)
        assert environ == theirs
    counted = {"GOMP_SPINCOUNT": "7"}
    launch.prepare(counted)
    assert counted["GOMP_SPINCOUNT"] == "7"


def test_the_command_line_says_it_first() -> None:
    code = (
        "import sys, os; from pvdconvert.cli import main; main.run(['formats', '--json']);"
        f"print(os.environ['GOMP_SPINCOUNT'], os.environ['{PAGES}'], 'torch' in sys.modules, file=sys.stderr)"
    )
    bare = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", PAGES)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare)
    assert done.stderr.split()[-3:] == [launch.SPINS, "1", "False"]
