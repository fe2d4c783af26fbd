"""Enrolment codes: address, coordinator's key and a secret for one use, in letters for people.

What stands in a code is all that a device needs to be let in once, and nothing else: it is told the
coordinator's whole public key, and a one-time pair of CURVE keys is computed from the secret. So
the secret itself never travels. Pure, but for drawing a secret. Not here: how a code is redeemed
(`enrol.py`), and how the coordinator keeps it (its `coordinator/gateway/keys`).
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import struct
import zlib
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85

from edge_sdk.errors import ConfigError
from edge_sdk.transport.addresses import check_dialled, parse_address
from edge_sdk.transport.keys import KeyPair, is_public_key

# Crockford's base32: no I, L, O and U, which people take for 1, 1, 0 and V.
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LOOKALIKES = str.maketrans("ILO", "110")
_BITS = 5
# Letters between two dashes.
GROUP = 8
VERSION = 1
KEY_BYTES = 32
SECRET_BYTES = 16
"""128 bits: nobody guesses them, not even from the hash that the coordinator keeps."""
_CHECK = struct.Struct(">I")
# Version, kind of host, port.
_HEAD = struct.Struct(">BBH")
_IPV4, _IPV6, _NAME = 4, 6, 0
# DNS has no longer ones.
_MOST_NAME_BYTES = 253
_PURPOSE = b"EdgeSplit enrolment, one-time key\0"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolCode:
    """What an enrolment code says; its secret never shows in a log."""

    address: str
    """Where the coordinator is: tcp://HOST:PORT."""
    server_key: str
    """The coordinator's whole public key."""
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        check_dialled("address", self.address)
        if not is_public_key(self.server_key):
            raise ValueError(f"server_key {self.server_key!r} is no public key")
        if len(self.secret) != SECRET_BYTES:
            raise ValueError(f"secret has {len(self.secret)} bytes, not {SECRET_BYTES}")


def new_code(address: str, server_key: str) -> EnrolCode:
    """Return a code that nobody has had before."""
    return EnrolCode(
        address=address, server_key=server_key, secret=secrets.token_bytes(SECRET_BYTES)
    )


def one_time_keys(code: EnrolCode) -> KeyPair:
    """Return the keys with which whoever has the code may enrol; they follow from its secret."""
    raw = hashlib.sha256(_PURPOSE + _raw_key(code.server_key) + code.secret).digest()
    secret = z85.encode(raw)
    return KeyPair(zmq.curve_public(secret).decode(), secret.decode())


def write_code(code: EnrolCode) -> str:
    """Return *code* in letters: in groups with dashes between, as they are copied and typed."""
    data = _packed(code)
    letters = _letters(data + _CHECK.pack(zlib.crc32(data)))
    return "-".join(letters[at : at + GROUP] for at in range(0, len(letters), GROUP))


def read_code(text: str) -> EnrolCode:
    """Return what a code says; dashes, spaces, line ends and quotes in it mean nothing.

    Raises:
        ConfigError: it is no code, or not as it was made; the message says in what way.
    """
    letters = "".join(filter(str.isalnum, text)).upper().translate(_LOOKALIKES)
    if not letters:
        raise ConfigError("the enrolment code is empty")
    for place, letter in enumerate(letters, 1):
        if letter not in ALPHABET:
            raise ConfigError(f"no enrolment code has {letter!r}, the letter {place} of this one")
    data, is_exact = _bytes(letters)
    body, check = data[: -_CHECK.size], data[-_CHECK.size :]
    if not body or not is_exact or check != _CHECK.pack(zlib.crc32(body)):
        raise ConfigError(_mistake(data, len(letters)))
    if body[0] != VERSION:
        raise ConfigError(f"the enrolment code is of version {body[0]}, this side reads {VERSION}")
    return _unpacked(body)


def _letters(data: bytes) -> str:
    bits = len(data) * 8
    num_letters = -(-bits // _BITS)
    number = int.from_bytes(data, "big") << (num_letters * _BITS - bits)
    return "".join(
        ALPHABET[number >> (_BITS * place) & 31] for place in reversed(range(num_letters))
    )


def _bytes(letters: str) -> tuple[bytes, bool]:
    """Return the whole bytes in *letters*, and whether they are written as `_letters` does."""
    number = 0
    for letter in letters:
        number = number << _BITS | ALPHABET.index(letter)
    num_bytes, rest = divmod(len(letters) * _BITS, 8)
    is_exact = rest < _BITS and not number & ((1 << rest) - 1)
    return (number >> rest).to_bytes(num_bytes, "big"), is_exact


def _mistake(data: bytes, num_letters: int) -> str:
    """Return what is wrong with a code whose check fails."""
    mistyped = "the enrolment code is mistyped: a letter of it is not as it was printed"
    size = _size(data)
    due = 0 if size is None else -(-(size + _CHECK.size) * 8 // _BITS)
    if size is None and num_letters < 90:
        return f"this is no whole enrolment code: it has only {num_letters} letters"
    if not due or due == num_letters:
        return mistyped
    return f"the enrolment code has {num_letters} letters where {due} are due; copy all of it"


def _packed(code: EnrolCode) -> bytes:
    where = parse_address(code.address)
    assert where is not None
    name, port = where
    kind, host = _NAME, name.encode("ascii", "replace")
    try:
        parsed = ipaddress.ip_address(name)
        if str(parsed) == name and "%" not in name:
            kind, host = parsed.version, parsed.packed
    except ValueError:
        pass
    if kind == _NAME:
        if not name.isascii() or len(host) > _MOST_NAME_BYTES:
            raise ConfigError(f"address {code.address!r}: its host has no place in a code")
        host = bytes([len(host)]) + host
    return _HEAD.pack(VERSION, kind, port) + host + _raw_key(code.server_key) + code.secret


def _host_bytes(data: bytes) -> tuple[int, int] | None:
    """Return where the host begins and ends in *data*; None where that is not to be seen."""
    start = _HEAD.size
    if len(data) < start + 1 or data[0] != VERSION:
        return None
    if data[1] == _NAME:
        return start + 1, start + 1 + data[start]
    size = {_IPV4: 4, _IPV6: 16}.get(data[1])
    return None if size is None else (start, start + size)


def _size(data: bytes) -> int | None:
    """Return how long a code ought to be that begins like *data*, in bytes without its check."""
    host = _host_bytes(data)
    return None if host is None else host[1] + KEY_BYTES + SECRET_BYTES


def _unpacked(body: bytes) -> EnrolCode:
    place = _host_bytes(body)
    if place is None or len(body) != place[1] + KEY_BYTES + SECRET_BYTES:
        raise ConfigError("the enrolment code is none that this version makes")
    _, kind, port = _HEAD.unpack_from(body)
    raw, rest = body[slice(*place)], body[place[1] :]
    name = raw.decode("ascii", "replace") if kind == _NAME else str(ipaddress.ip_address(raw))
    host = f"[{name}]" if ":" in name else name
    try:
        return EnrolCode(
            address=f"tcp://{host}:{port}",
            server_key=z85.encode(rest[:KEY_BYTES]).decode(),
            secret=rest[KEY_BYTES:],
        )
    except ValueError as error:
        raise ConfigError(f"the enrolment code is none that this version makes: {error}") from error


def _raw_key(public: str) -> bytes:
    try:
        return bytes(z85.decode(public.encode()))
    except (ValueError, struct.error) as error:
        raise ConfigError(f"{public!r} is no public key") from error
