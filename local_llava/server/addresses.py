"""Which internet addresses are public: those that a stranger may have this computer fetch a picture from.

Knows the registries of special addresses (RFC 6890 and its successors) and what networks this computer is in. Knows no
http and no names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import psutil

from local_llava.pictures.fetch import Address

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ALLOCATED = ipaddress.IPv6Network("2000::/3")
"""All that is given out of IPv6 for use between networks."""

# Python's own tables differ between releases, so what must not be reached is listed here, even where some have it.
_SPECIAL = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "100.64.0.0/10",  # carriers' own; 100.100.100.200 is Alibaba Cloud's metadata
        "168.63.129.16/32",  # Azure's metadata, at a public address
        "192.0.0.0/24",  # 192.0.0.192 is Oracle Cloud's metadata
        "192.88.99.0/24",
        "198.18.0.0/15",
        "240.0.0.0/4",
        "2001::/23",  # Teredo and other protocols' own
        "2001:db8::/32",
        "3fff::/20",
    )
)


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and in no network that this computer is itself in."""
    if isinstance(address, ipaddress.IPv6Address):
        stands_for = _ipv4_of(address)
        if stands_for is not None:
            return is_public(stands_for)
        if address not in _ALLOCATED or _is_isatap(address):
            return False
    return (
        address.is_global
        and not address.is_multicast
        and not any(address in network for network in _SPECIAL)
        and not any(address in network for network in _near())
    )


def _ipv4_of(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """Where packets to an address that stands for one of IPv4 go: mapped, translated by NAT64, or 6to4's."""
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_isatap(address: ipaddress.IPv6Address) -> bool:
    """Whether the lower half holds an IPv4 address of the network's inside, RFC 5214."""
    return (int(address) >> 32) & 0xFDFFFFFF == 0x5EFE


def _near() -> Iterator[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The networks of this computer. Neighbours may have public addresses; in IPv6 all have."""
    for cards in psutil.net_if_addrs().values():
        for card in cards:
            try:
                address = ipaddress.ip_address(card.address.partition("%")[0])
                mask = int(ipaddress.ip_address(card.netmask or ""))
            except ValueError:
                # A hardware's address, or a mask that the system does not tell.
                continue
            # One of a few bits is no neighbourhood: some tunnels have the whole internet in theirs.
            if mask.bit_count() >= 8:
                yield ipaddress.ip_network((address, mask.bit_count()), strict=False)
