"""Which addresses count as public: the special ranges of RFC 6890, and IPv4 inside IPv6."""

from ipaddress import ip_network

import pytest

from curation.web.addresses import is_public

PRIVATE = """
    127.0.0.1 127.8.9.1 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.2.1
    198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255 ::1 :: fe80::1 fe80::1%eth0 fc00::1 ff02::1
    2001:db8::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_and_special_addresses_are_refused(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_public_addresses_are_admitted(address: str) -> None:
    assert is_public(address)


def test_a_network_that_is_allowed_opens_only_itself() -> None:
    allowed = [ip_network("10.1.0.0/16")]
    assert is_public("10.1.2.3", allowed)
    assert is_public("::ffff:10.1.2.3", allowed)
    assert not is_public("10.2.2.3", allowed)
    assert not is_public("::1", allowed)
