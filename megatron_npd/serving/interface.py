"""The network interface that a server listens on: a free port of it, and who can reach it there."""

from __future__ import annotations

import ipaddress
import socket

from megatron_npd.errors import UserError


def listen_on(host: str, port: int) -> tuple[str, int]:
    """The address that a host names on this machine, and ``port``, or any where it is 0, on which nothing listens.

    Raises:
        UserError: It is no address of this machine, all of its addresses at once, or something listens there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:  # the latter of a name that is none
            raise UserError(
                f"port {port} of {host} must be a free one of this machine, got {error}; stop what listens there, or "
                "give another --host or --port"
            ) from error
        address, free = probe.getsockname()[:2]
    if ipaddress.ip_address(address).is_unspecified:  # its URL would lead other nodes, and the token, to themselves
        raise UserError(
            f"the servers' host must be the name or address of one interface, under which clients reach it, got "
            f"{host!r}; give 127.0.0.1, or this machine's name"
        )
    return address, free


def reach(host: str, address: str) -> str:
    """Who can reach servers on an interface, and what guards them, in one line.

    Args:
        host: Name or address as it was given.
        address: The address that it names here.
    """
    where = host if host == address else f"{host} ({address})"
    if ipaddress.ip_address(address).is_loopback:
        return f"servers on {where} are in reach of every user of this machine, not of others; the token guards them"
    return f"servers on {where} are in reach of the network, unencrypted; the token guards them"
