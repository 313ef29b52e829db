"""How idle threads wait is said before torch is imported, unless the user has said it."""

from __future__ import annotations

import os
import subprocess
import sys

from pvdconvert import waiting


def test_what_the_user_says_stays() -> None:
    said: dict[str, str] = {}
    waiting.briefly(said)
    assert said == {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": waiting.SPINS}
    waiting.briefly(said)
    assert said["GOMP_SPINCOUNT"] == waiting.SPINS
    for theirs in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}):
        environ = dict(theirs)
        waiting.briefly(environ)
        assert environ == theirs
    counted = {"GOMP_SPINCOUNT": "7"}
    waiting.briefly(counted)
    assert counted["GOMP_SPINCOUNT"] == "7"


def test_the_command_line_says_it_first() -> None:
    code = (
        "import sys, os; from pvdconvert.cli import main; main.run(['formats', '--json']);"
        "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules, file=sys.stderr)"
    )
    bare = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=bare)
    assert done.stderr.split()[-2:] == [waiting.SPINS, "False"]
