"""Errors that a person reads: one line, with the documented exit code. Imports nothing heavy.

A message names what failed (the file, the plugin or format, the key) and what to type next. Library code raises these;
only ``pvdconvert.cli`` prints them and exits.
"""

from __future__ import annotations


class PvdError(Exception):
    """Base of every error that pvdconvert raises on purpose.

    ``hint`` is what to type or do next; it is appended to the message. Newlines are folded, so ``str()`` is one line.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        text = " ".join(message.split())
        hint = " ".join(hint.split())
        super().__init__(f"{text} ({hint})" if hint else text)


class UsageError(PvdError):
    """The command line or the arguments contradict each other."""

    exit_code = 2


class InputError(PvdError):
    """The input cannot be read: missing, truncated, corrupt, of the wrong shape."""

    exit_code = 3


class UnknownError(PvdError):
    """A format or architecture is unknown, or several fit equally well."""

    exit_code = 4


class PluginError(PvdError):
    """A plugin is missing, broken, incompatible, or clashes with another."""

    exit_code = 5


class QualityError(PvdError):
    """The result misses the quality that was asked for."""

    exit_code = 6


class DeviceError(PvdError):
    """Out of memory, or the device is not there."""

    exit_code = 7


class UnsafeError(PvdError):
    """The file asks for something that we refuse to do, such as running code."""

    exit_code = 8


class OutputError(PvdError):
    """The output cannot be written."""

    exit_code = 9


class RequestError(PvdError):
    """The request cannot be met: impossible size, empty scene, weights that are not numbers."""

    exit_code = 10


class Interrupted(PvdError):
    """Stopped by the user; the message says how to resume."""

    exit_code = 130
