"""Where a server listens, who can reach it there, and who may talk to it. Imports no torch and no viser."""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import socket
from urllib.parse import urlsplit

from pvdconvert.errors import RequestError, UsageError

LOOPBACK = "127.0.0.1"
_NAMES = {"localhost", "127.0.0.1", "::1"}


@dataclasses.dataclass(frozen=True)
class Address:
    """A numeric ``host`` and a ``port`` (0 = any that is free)."""

    host: str
    port: int

    @property
    def private(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def url(self) -> str:
        """What to type into a browser on this machine."""
        ip = ipaddress.ip_address(self.host)
        host = ("::1" if ip.version == 6 else LOOPBACK) if ip.is_unspecified else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def resolve(host: str, port: int) -> Address:
    """The numeric address of ``host``, on which ``port`` can be listened to now.

    Raises UsageError where the host has no address on this machine, RequestError where the port is taken or needs
    privileges.
    """
    if host == "localhost":
        host = LOOPBACK
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host}: no such host", hint="127.0.0.1 is this machine alone") from error
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(where)
            trial.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise in_use(port) from error
            if error.errno == errno.EADDRNOTAVAIL:
                raise UsageError(
                    f"--host {host}: not an address of this machine", hint="0.0.0.0 is all that it has"
                ) from error
            hint = "--port 0 takes any free one"
            raise RequestError(f"port {port} of {host} cannot be listened to: {error.strerror}", hint=hint) from error
    return Address(str(where[0]), port)


def in_use(port: int) -> RequestError:
    return RequestError(f"port {port} is in use", hint="--port 0 takes any free one")


def welcome(listening: str, host: str | None, origin: str | None) -> bool:
    """Whether a connection with these headers may be answered by a server that listens on the numeric ``listening``.

    Browsers let any page connect to any server, and only say which page it is (Origin): pages of other servers are
    turned away, and so are names that were made to point here (Host) while nobody else is meant to reach the server.
    Programs that are no browsers send no Origin.
    """
    target = urlsplit(f"//{host or ''}")
    if ipaddress.ip_address(listening).is_loopback and target.hostname not in {*_NAMES, listening}:
        return False
    return origin is None or urlsplit(origin).netloc.lower() == target.netloc.lower()
