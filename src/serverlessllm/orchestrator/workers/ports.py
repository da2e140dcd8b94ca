"""One port for several processes: each has a socket of its own there (`SO_REUSEPORT`).

The main process makes the sockets and keeps them, workers inherit them. So a port 0 is one port for
all; and who had connected to a worker that died before it accepted them waits in its socket for the
worker that takes its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from typing import cast

from serverlessllm.core.ids import Address
from serverlessllm.edge.wire import join_address, split_address

_Name = tuple[str, int] | tuple[str, int, int, int]
_Place = tuple[socket.AddressFamily, _Name]
"""A family of addresses and, in its spelling, one of them with a port."""


class Port:
    """An address that is ours for as long as this is open; `shares` of it are for workers."""

    def __init__(self, address: Address, places: list[_Place]) -> None:
        """`reserve` makes one.

        Raises:
            OSError: somebody else has it.
        """
        self._places: list[_Place] = []
        self._held: list[socket.socket] = []
        """Bound and never listening: nobody connects to them, and nobody else gets the port."""
        try:
            for family, where in places:
                port = self._places[0][1][1] if self._places else where[1]
                place = (family, (where[0], port, *where[2:]))
                _refuse_if_taken(place)
                held = _bound(place)
                self._held.append(held)
                self._places.append((family, held.getsockname()))
        except OSError:
            self.close()
            raise
        host, _ = _host_and_port(address)
        self.address = join_address(host, self._places[0][1][1])
        """With the port in fact."""

    def share(self) -> list[socket.socket]:
        """Sockets for one more worker, one for each address that the host's name stands for.

        Raises:
            OSError: no descriptors are left.
        """
        with contextlib.ExitStack() as made:
            shares = [made.enter_context(_bound(place)) for place in self._places]
            made.pop_all()
        return shares

    def close(self) -> None:
        """Give the port up; the shares are others' to close."""
        while self._held:
            self._held.pop().close()


async def reserve(address: Address) -> Port:
    """Take the port of `http://host:port`; 0 takes a free one.

    Raises:
        ValueError: it is not such an address.
        OSError: somebody else has it, or it is not one of this machine.
    """
    host, port = _host_and_port(address)
    found = await asyncio.get_running_loop().getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    places = dict.fromkeys((family, cast("_Name", where)) for family, _, _, _, where in found)
    return Port(address, list(places))


def _host_and_port(address: Address) -> tuple[str, int]:
    where = split_address(address)
    if isinstance(where, str):
        raise ValueError(
            f"listen address {address}: workers share a port, and a unix socket is one "
            "process's: set orchestrator.workers to 1, or listen on host:port"
        )
    return where


def _bound(place: _Place) -> socket.socket:
    made = socket.socket(place[0], socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(made, place)
    except OSError:
        made.close()
        raise
    return made


def _refuse_if_taken(place: _Place) -> None:
    """A second server of ours would share the port with the first one unasked, and get half of its
    clients: a socket that shares nothing finds out."""
    with socket.socket(place[0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(probe, place)


def _bind(bound: socket.socket, place: _Place) -> None:
    family, where = place
    if family == socket.AF_INET6:
        bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        bound.bind(where)
    except OSError as error:
        number = error.errno or errno.EINVAL
        raise OSError(number, f"{os.strerror(number)}: {where[0]}:{where[1]}") from None
