"""The frame around everything: a packet, 32 bytes of prefix and one msgpack bin.

A packet is one ZeroMQ frame and one valid msgpack object, an array of seven with fixed widths:

    97 vv kk ll ce tttttttt cf ssssssssssssssss cf pppppppppppppppp c6 nnnnnnnn | n bytes
       version kind lane tag         sequence              place           bin

Fixed widths let one struct read it, and leave the payload at a multiple of 8 bytes, so that a
tensor is used where it was received. Kinds FIRST and CHUNK are numbered and resent by
`channel.py`; CONTROL packets (attach, acks, heartbeats) are not. Each carries a dataclass of those
below.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from edge_sdk.errors import RemoteProtocolError
from edge_sdk.protocol import headers as wire

FRAME_VERSION = 1
_PREFIX = struct.Struct(">BBBBBIBQBQBI")
PREFIX_BYTES = _PREFIX.size

# At most this much payload in a packet: one frame is one unit of memory, resend and fairness.
MAX_CHUNK_BYTES = 1024 * 1024
# Payload of the first packet of a message: header and first chunk.
MAX_PAYLOAD_BYTES = MAX_CHUNK_BYTES + wire.MAX_HEADER_BYTES + 8
# Largest frame, told to libzmq (which counts 33 bytes of CURVE as well).
MAX_FRAME_BYTES = MAX_PAYLOAD_BYTES + 1024
# Control frames are read from peers that have no session yet.
MAX_CONTROL_BYTES = 8 * 1024


class Lane(IntEnum):
    """The two connections of a device."""

    CONTROL = 0
    BULK = 1


class Kind(IntEnum):
    """What the payload of a packet is."""

    FIRST = 1
    """Length of the header (4 bytes), header, zeros up to a multiple of 8, first chunk."""
    CHUNK = 2
    CONTROL = 3


class Packet(NamedTuple):
    """One packet as it was received."""

    kind: int
    lane: int
    tag: int
    """First 32 bits of the session; packets of an earlier one are dropped."""
    seq: int
    """Number of the packet in its lane, from 0."""
    place: int
    """FIRST: number of the message in the session. CHUNK: offset in the message's payload."""
    payload: memoryview


def write_prefix(
    out: bytearray | memoryview, kind: int, lane: int, tag: int, seq: int, place: int, size: int
) -> None:
    """Write the prefix of a packet with *size* bytes of payload to the start of *out*."""
    _PREFIX.pack_into(
        out, 0, 0x97, FRAME_VERSION, kind, lane, 0xCE, tag, 0xCF, seq, 0xCF, place, 0xC6, size
    )


def prefix(kind: int, lane: int, tag: int, seq: int, place: int, size: int) -> bytes:
    """Return the prefix of a packet with *size* bytes of payload."""
    return _PREFIX.pack(
        0x97, FRAME_VERSION, kind, lane, 0xCE, tag, 0xCF, seq, 0xCF, place, 0xC6, size
    )


_LENGTH = struct.Struct(">I")


def first_head(header: bytes) -> bytes:
    """Return what stands before the chunk in the payload of a FIRST packet."""
    return _LENGTH.pack(len(header)) + header + bytes(-(_LENGTH.size + len(header)) % 8)


def split_first(payload: memoryview) -> tuple[memoryview, memoryview]:
    """Return header and chunk of a FIRST packet's payload."""
    if len(payload) < _LENGTH.size:
        raise RemoteProtocolError("first packet without a header")
    end = _LENGTH.size + _LENGTH.unpack_from(payload)[0]
    if end > len(payload):
        raise RemoteProtocolError(f"header ends {end - len(payload)} bytes after its packet")
    return payload[_LENGTH.size : end], payload[end + -end % 8 :]


def read_packet(frame: memoryview) -> Packet:
    """Return the packet in *frame*; its payload is a slice, not a copy."""
    if len(frame) < PREFIX_BYTES:
        raise RemoteProtocolError(f"frame of {len(frame)} bytes is too short for a packet")
    a, version, kind, lane, b, tag, c, seq, d, place, e, size = _PREFIX.unpack_from(frame)
    if (a, b, c, d, e) != (0x97, 0xCE, 0xCF, 0xCF, 0xC6):
        raise RemoteProtocolError("frame does not begin like a packet")
    if version != FRAME_VERSION:
        raise RemoteProtocolError(f"frame version {version}, this side speaks {FRAME_VERSION}")
    if not 1 <= kind <= 3 or lane > 1:
        raise RemoteProtocolError(f"packet of kind {kind} on lane {lane}")
    if size != len(frame) - PREFIX_BYTES:
        raise RemoteProtocolError(
            f"bin of {size} bytes in a frame with room for {len(frame) - PREFIX_BYTES}"
        )
    if size > (MAX_PAYLOAD_BYTES if kind == Kind.FIRST else MAX_CHUNK_BYTES):
        raise RemoteProtocolError(f"chunk of {size} bytes, at most {MAX_CHUNK_BYTES}")
    return Packet(kind, lane, tag, seq, place, frame[PREFIX_BYTES:])


# ---- control frames ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """What has arrived, and up to where more may be sent. Both ways, always on control."""

    control_next: int
    """Number of the packet expected next on the control lane; all before have arrived."""
    control_credit: int
    """Payload bytes that may be sent on the lane, counted from the start of the session."""
    bulk_next: int
    bulk_credit: int
    gap: bool = False
    """Whether a later packet came instead of the expected one: send again from there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """First packet of a connection: whose it is. Device -> coordinator, once per lane."""

    session: str
    is_resumed: bool
    """Whether the coordinator has answered this session before, so that it ought to know it."""
    sdk_version: str
    name: str
    """Name of the device; only a coordinator without CURVE believes it."""
    ack: Ack


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """The lane belongs to the session. Coordinator -> device."""

    session: str
    name: str
    """Name under which the device's key is registered."""
    ack: Ack


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Sign of life. Device -> coordinator, every few seconds."""

    sent_s: float
    """Seconds on the device's own monotonic clock; they come back in the answer."""
    rtt_s: float
    """Last measured round trip in seconds; 0 before the first."""
    numbers: dict[str, float]
    """Telemetry by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatAck:
    """Answer to a heartbeat. Coordinator -> device."""

    sent_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequired:
    """Answer to a packet of an unknown sender: attach first. Coordinator -> device."""

    session: str = ""
    """Session to which nothing gets through on one of its lanes: connect anew. Empty otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownSession:
    """That session is not known here (any more). Coordinator -> device."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """The session is over and must not be resumed. Coordinator -> device."""

    session: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Detach:
    """The device ends its session. Device -> coordinator."""

    session: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrol:
    """Register this key, on the strength of the connection's own. Device -> coordinator."""

    key: str
    """The device's own public key, from now on."""
    sdk_version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """The key is registered. Coordinator -> device."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolRefused:
    """The key is not registered. Coordinator -> device."""

    reason: str
    """For a person: what is wrong with the code, or with the key."""
    may_pass: bool
    """Whether the same question may be answered otherwise in a moment."""


# By their names on the wire, which are those of the first release: an older SDK is understood.
CONTROL_FRAMES: dict[str, type] = {
    "Ack": Ack,
    "Attach": Attach,
    "Attached": Attached,
    "Beat": Heartbeat,
    "BeatBack": HeartbeatAck,
    "WhoAreYou": AttachRequired,
    "Unknown": UnknownSession,
    "Closed": Closed,
    "Leaving": Detach,
    "Enrol": Enrol,
    "Enrolled": Enrolled,
    "EnrolRefused": EnrolRefused,
}
_WIRE_NAMES = {kind: name for name, kind in CONTROL_FRAMES.items()}


def control_frame(control: Any, lane: int = Lane.CONTROL, tag: int = 0) -> bytes:
    """Return the packet that carries *control*."""
    data = wire.pack((_WIRE_NAMES[type(control)], wire.write_fields(control)))
    return prefix(Kind.CONTROL, lane, tag, 0, 0, len(data)) + data


def control_in(frame: Any) -> Any:
    """Return what the packet in *frame* says as a control frame; None for one of another kind.

    Raises:
        RemoteProtocolError: it is no packet, or no control frame that we know.
    """
    packet = read_packet(frame)
    return read_control(packet) if packet.kind == Kind.CONTROL else None


def read_control(packet: Packet) -> Any:
    """Return what a packet of kind CONTROL carries."""
    if len(packet.payload) > MAX_CONTROL_BYTES:
        raise RemoteProtocolError(
            f"control frame of {len(packet.payload)} bytes, at most {MAX_CONTROL_BYTES}"
        )
    value = wire.unpack(packet.payload, "control frame")
    if type(value) is not tuple or len(value) != 2 or type(value[0]) is not str:
        raise RemoteProtocolError("control frame is not (name, fields)")
    kind = CONTROL_FRAMES.get(value[0])
    if kind is None:
        raise RemoteProtocolError(f"unknown control frame {value[0][:60]!r}")
    return wire.read_fields(kind, value[1], kind.__name__)
