"""The application: which commands there are, the default command, and the one place where everything starts and ends.

Imports no torch, and neither does any command module: heavy code is imported inside a command, after every check that
can refuse has passed.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pvdconvert import launch
from pvdconvert.cli import ending, errors, reporting
from pvdconvert.cli.output import say
from pvdconvert.errors import UsageError

PROGRAM = "pvdconvert"
DEFAULT = "convert"
INTERRUPTED = 130
# Adding a name here is a breaking change for files of that name: they then need "./".
COMMANDS = (
    "convert",
    "train",
    "batch",
    "formats",
    "inspect",
    "render",
    "view",
    "compare",
    "eval",
    "plugins",
    "selftest",
    "doctor",
)
_MODULES = {"eval": "evaluate"}
"""Commands whose module has another name."""

HELP = """Convert a trained radiance field of one architecture into another.

\b
  pvdconvert FILE --to ARCHITECTURE [-o OUT]     the same as: pvdconvert convert FILE ...
  pvdconvert inspect FILE                        what is in this file?
  pvdconvert formats                             what can be read and written?
"""
EPILOG = """\b
A file named like a command needs "./": pvdconvert ./formats --to ngp
Exit codes: 0 ok, 1 internal, 2 usage, 3 input unreadable, 4 format or architecture unknown, 5 plugin broken,
6 quality gate not met, 7 out of memory or no such device, 8 refused as unsafe, 9 output cannot be written,
10 request cannot be met, 11 some rows of a batch failed, 130 interrupted.
"""


class DefaultGroup(TyperGroup):
    """A group whose first word may be the argument of the default command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args:
            own = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
            first = args[0]
            if first not in self.commands and first.split("=")[0] not in own:
                if not ctx.resilient_parsing:
                    _suggest(first, args)
                args = [DEFAULT, *args]
            elif first in self.commands and not ctx.resilient_parsing:
                _shadowed(first, args)
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Commands, and the files that could be meant as well: shells offer files only where nothing else fits."""
        items = super().shell_complete(ctx, incomplete)
        if items and incomplete and not incomplete.startswith("-"):
            item = type(items[0])
            items += [item(name) for name in sorted(os.listdir()) if name.startswith(incomplete)]
        return items


def _suggest(first: str, args: list[str]) -> None:
    """Refuse a mistyped command before it is taken for a file."""
    if first.startswith("-") or os.sep in first or os.path.lexists(first):
        return
    near = difflib.get_close_matches(first, COMMANDS, 1, 0.6)
    if near:
        raise UsageError(f"no file or command {first!r}", hint=f"did you mean the command {near[0]!r}?")
    if len(args) == 1 and not os.path.splitext(first)[1]:
        raise UsageError(f"no file or command {first!r}", hint=f"commands: {', '.join(COMMANDS)}")


def _shadowed(first: str, args: list[str]) -> None:
    """A file named like a command, clearly meant as a file."""
    targets = [a for a in args[1:] if a in ("-t", "--to") or a.startswith("--to=")]
    if first not in (DEFAULT, "batch", "train") and targets:
        what = "convert the file" if os.path.lexists(first) else "convert a file"
        raise UsageError(
            f"{first!r} is a command, and does not take {targets[0].split('=')[0]}",
            hint=f"to {what} of that name: {PROGRAM} ./{first} --to ...",
        )


def _version(wanted: bool) -> None:
    if not wanted:
        return
    import platform
    from importlib.metadata import version

    parts = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy"))
    say(f"{PROGRAM} {version(PROGRAM)} (Python {platform.python_version()}, {parts})")
    raise typer.Exit(0)


def build() -> typer.Typer:
    """The Typer application with every command registered."""
    app = typer.Typer(
        name=PROGRAM,
        cls=DefaultGroup,
        help=HELP,
        epilog=EPILOG,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118},
    )

    @app.callback()
    def root(
        version: Annotated[
            bool, typer.Option("--version", is_eager=True, callback=_version, help="Show versions and exit.")
        ] = False,
    ) -> None:
        pass

    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.{_MODULES.get(name, name)}")
        app.command(name)(module.command)
    return app


def main() -> int:
    """The program: :func:`run`, and an end that suits torchrun."""
    code = run()
    ending.leave(code)
    return code


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv`` without the program's name; None = this process's."""
    launch.prepare()
    args = list(sys.argv[1:] if argv is None else argv)
    reporting.remember(args)
    wants_json = "--json" in args
    verbose = bool({"-v", "--verbose"} & set(args))
    bare = not args and not any(name.endswith("_COMPLETE") for name in os.environ)
    with errors.streams():
        try:
            result = build()(args if not bare else ["--help"], prog_name=PROGRAM, standalone_mode=False)
            if result == INTERRUPTED:  # Typer has turned a KeyboardInterrupt into this
                raise KeyboardInterrupt
            sys.stdout.flush()
        except BaseException as error:
            return errors.report(error, json=wants_json, verbose=verbose)
    return 2 if bare else result if isinstance(result, int) else 0
