"""Every failure ends here: one line on stderr, the documented exit code, and JSON on stdout if that was asked for."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

import typer

from pvdconvert import ranks
from pvdconvert.cli.output import emit, warn
from pvdconvert.errors import Interrupted, PvdError, UsageError

# Typer carries its own copy of Click since 0.26; its exception classes are reachable by this name in every version.
_USAGE: type[BaseException] = typer.BadParameter.__mro__[1]
_CLICK: type[BaseException] = typer.BadParameter.__mro__[2]
BROKEN_PIPE = 141  # 128 + SIGPIPE: what a shell sees from a program that the signal ends
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}


def describe(error: BaseException) -> tuple[str, int]:
    """One line and the exit code for ``error``."""
    if isinstance(error, PvdError):
        return str(error), error.exit_code
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted", 130
    if isinstance(error, _CLICK):
        return _usage(error), 2
    if _out_of_memory(error):
        return f"out of memory: {_first_line(error)} (try --preset fast, --max-mb, or another --device)", 7
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}cannot be written: {error.strerror}", 9
    text = f"{type(error).__name__}: {_first_line(error)}".rstrip(": ")
    return f"internal error: {text} (run with -v for the traceback)", 1


def report(error: BaseException, *, json: bool, verbose: bool) -> int:
    """Print ``error`` and return its exit code. SystemExit and a broken pipe end quietly."""
    # Typer answers a broken pipe with SystemExit(1) of its own.
    cause = error.__context__ if isinstance(error, SystemExit) else error
    if isinstance(cause, BrokenPipeError):
        _discard(sys.stdout)
        return BROKEN_PIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    text, code = describe(error)
    if ranks.size() > 1:
        if not ranks.claim():
            return code
        text = ranks.prefix() + text
    with contextlib.suppress(OSError):
        if verbose and not isinstance(error, (KeyboardInterrupt, UsageError, Interrupted, _CLICK)):
            sys.stderr.write("".join(traceback.format_exception(error)))
        warn(f"error: {text}")
    if json:
        try:
            emit({"schema": "pvdconvert/error/1", "error": text, "exit_code": code})
            sys.stdout.flush()
        except OSError:
            _discard(sys.stdout)
    return code


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """File names that the terminal cannot show are escaped instead of failing; warnings take one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        warn(f"warning: {' '.join(str(message).split())}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _usage(error: BaseException) -> str:
    format_message = getattr(error, "format_message", None)
    text = " ".join(str(format_message() if format_message else error).split()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", "pvdconvert")
    return f"{text} (see {path} --help)"


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return " ".join(text.splitlines()[0].split()) if text else type(error).__name__


def _discard(stream: TextIO) -> None:
    """Point a broken stream to nowhere, so that the interpreter's last flush says nothing."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
