"""Which addresses may be connected to: public ones, and networks that a recipe allows by name.

The check sits where a socket is made for one resolved address, so that neither a redirect nor a
name server that changes its answer can lead inside.
"""

import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address


class PrivateAddress(OSError):
    """An address inside a private, local or reserved network."""


def is_public(text: str, allowed: Sequence[Network] = ()) -> bool:
    """Whether an address may be connected to. IPv4 inside IPv6 is judged as what it leads to."""
    address = _reached(ipaddress.ip_address(text.partition("%")[0]))
    if any(address in network for network in allowed):
        return True
    return address.is_global and not address.is_multicast


def _reached(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo[1] if address.teredo else None
    return address.ipv4_mapped or address.sixtofour or teredo or address


def guarded_socket(allowed: Sequence[Network]) -> Callable[[Any], socket.socket]:
    """Makes the socket for one resolved address, or raises PrivateAddress."""

    def make(info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        family, kind, protocol, _, place = info
        if not is_public(place[0], allowed):
            raise PrivateAddress(f"{place[0]} is not a public address")
        return socket.socket(family, kind, protocol)

    return make
