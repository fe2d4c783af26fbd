"""Messages cut into packets, and packets joined to messages.

Pure. Not here: order, loss and credits (`channel.py`). The payload of a message is its encoded
tensors one after the other, each at a multiple of `ALIGN_BYTES`, cut into chunks of equal size.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.protocol import codecs
from edge_sdk.protocol import headers as wire
from edge_sdk.protocol.codecs import Array, Bytes, Memories
from edge_sdk.protocol.packets import MAX_CHUNK_BYTES, Kind, Lane, Packet, first_head, split_first
from edge_sdk.protocol.tensors import check_tensors

# One cache line; it also keeps every chunk border on a whole number of the plain codecs.
ALIGN_BYTES = 64
# Messages with a larger payload take the bulk lane; one such chunk delays an ack by little.
BULK_FROM_BYTES = 32 * 1024

TensorOut = tuple[Array, str]
"""A tensor to be sent, and the name of its codec."""


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message and the tensors that came with it."""

    message: Any
    tensors: dict[str, Array]
    num_bytes: int = 0
    """Bytes of payload and header together, as they were on the wire."""
    lane: int = 0


def _layout(specs: tuple[wire.TensorSpec, ...]) -> tuple[list[int], list[int], int]:
    """Return where each tensor begins, how long it is, and the length of the whole payload."""
    starts, lengths, end = [], [], 0
    for spec in specs:
        length = codecs.encoded_bytes(spec.codec, spec.shape)
        start = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        starts.append(start)
        lengths.append(length)
        end = start + length
    return starts, lengths, end


# The tensors of a round's start lie alike for all devices with the same plan. What arrives is laid
# out anew each time: a peer must not fill our memory with its own.
_layout_of_ours = lru_cache(32)(_layout)


def _specs(tensors: Mapping[str, TensorOut]) -> tuple[wire.TensorSpec, ...]:
    return tuple(
        [wire.TensorSpec(name, codec, array.shape) for name, (array, codec) in tensors.items()]
    )


class SharedTensors(dict[str, TensorOut]):
    """Tensors that go to many peers as they are, and are encoded once; nobody may change them.

    Only for codecs without memory: what these write depends on what a peer has had before.
    """

    @cached_property
    def specs(self) -> tuple[wire.TensorSpec, ...]:
        """Name, codec and shape of each tensor."""
        return _specs(self)

    @cached_property
    def payload(self) -> Bytes:
        """All tensors as they stand in a message."""
        starts, lengths, total = _layout_of_ours(self.specs)
        out = np.zeros(total, np.uint8)
        for (array, codec), start, length in zip(self.values(), starts, lengths, strict=True):
            assert not codecs.find(codec).has_memory, f"codec {codec} has a memory of each peer"
            out[start : start + length] = codecs.encode(array, codec)
        return out


class OutgoingMessage:
    """A message on its way out, cut into packets that are made when they are due.

    The arrays are borrowed, not copied, until the peer has everything: do not write to them.
    """

    __slots__ = (
        *("_cut", "_lengths", "_rows", "_starts", "_whole"),
        *("chunk_bytes", "head", "lane", "num_packets", "total"),
    )

    def __init__(
        self,
        message: Any,
        tensors: Mapping[str, TensorOut],
        chunk_bytes: int = MAX_CHUNK_BYTES,
        memories: Memories | None = None,
    ) -> None:
        # Whole cache lines, so that hardly a number is cut in two.
        self.chunk_bytes = max(ALIGN_BYTES, chunk_bytes // ALIGN_BYTES * ALIGN_BYTES)
        specs = tensors.specs if isinstance(tensors, SharedTensors) else _specs(tensors)
        self._whole = tensors.payload if isinstance(tensors, SharedTensors) else None
        self._starts, self._lengths, self.total = _layout_of_ours(specs)
        self.lane = Lane.BULK if self.total > BULK_FROM_BYTES else Lane.CONTROL
        self._rows = [
            (codecs.grouped(array, codec, self._memory(memories, message, name, codec)), codec)
            for name, (array, codec) in (tensors.items() if self._whole is None else ())
        ]
        self._cut: tuple[int, int, Bytes] | None = None
        self.head = first_head(wire.encode_header(message, specs))
        """What stands before the first chunk in packet 0."""
        self.num_packets = max(1, -(-self.total // self.chunk_bytes))

    def _memory(
        self, memories: Memories | None, message: Any, name: str, codec: str
    ) -> codecs.Memory:
        # By lane, because only within a lane tensors arrive in the order in which they were sent.
        kind = type(message)
        return {} if memories is None else codecs.memory_of(codec, memories, self.lane, kind, name)

    def packet_bytes(self, number: int) -> int:
        """Return the payload of packet *number* in bytes."""
        rest = self.total - number * self.chunk_bytes
        size = rest if rest < self.chunk_bytes else self.chunk_bytes
        return size if number else size + len(self.head)

    def offset(self, number: int) -> int:
        """Return where in the payload of the message the chunk of packet *number* begins."""
        return number * self.chunk_bytes

    def write_chunk(self, number: int, out: Bytes) -> None:
        """Write the chunk of packet *number* into *out*, which has just its size."""
        begin = self.offset(number)
        end = begin + len(out)
        if self._whole is not None:
            out[:] = self._whole[begin:end]
            return
        which = max(0, bisect.bisect_right(self._starts, begin) - 1)
        filled = begin
        while which < len(self._starts) and self._starts[which] < end:
            start, length = self._starts[which], self._lengths[which]
            low, high = max(begin, start), min(end, start + length)
            if low < high:
                out[filled - begin : low - begin] = 0  # the gap before this tensor
                self._encode(which, low - start, out[low - begin : high - begin])
                filled = high
            which += 1
        out[filled - begin :] = 0

    def _encode(self, which: int, low: int, out: Bytes) -> None:
        """Fill *out* with the bytes of tensor *which* from its byte *low* on."""
        groups_GN, name = self._rows[which]
        size = self._lengths[which] // len(groups_GN)
        while len(out):
            index, skipped = divmod(low, size)
            num_whole = 0 if skipped else len(out) // size
            length = num_whole * size or min(size - skipped, len(out))
            if num_whole:
                groups = groups_GN[index : index + num_whole]
                codecs.CODECS[name].encode_into(groups, out[:length])
            else:
                out[:length] = self._group(which, index, size)[skipped : skipped + length]
            low, out = low + length, out[length:]

    def _group(self, which: int, index: int, size: int) -> Bytes:
        """Return all bytes of a group that the border of a chunk cuts; kept for the next chunk."""
        if self._cut is None or self._cut[:2] != (which, index):
            groups_GN, name = self._rows[which]
            self._cut = (which, index, np.empty(size, np.uint8))
            codecs.CODECS[name].encode_into(groups_GN[index : index + 1], self._cut[2])
        return self._cut[2]


@dataclass(slots=True)
class PackedMessage:
    """A message of which the header has come, and some chunks or all; its tensors as they came."""

    message: Any
    specs: tuple[wire.TensorSpec, ...]
    starts: list[int]
    lengths: list[int]
    total: int
    header_bytes: int
    filled: int = 0
    buffer: Any = None

    @property
    def num_bytes(self) -> int:
        """Bytes of payload and header together, as they were on the wire."""
        return self.total + self.header_bytes


@dataclass(slots=True)
class Reassembler:
    """Joins the packets of one lane, which come in order, to messages."""

    max_message_bytes: int
    """Most bytes of payload in a message; checked before any memory is taken for it."""
    allowed: tuple[type, ...] = ()
    """Messages that this side may receive; empty for all."""
    _open: PackedMessage | None = None
    _is_skipping: bool = False
    _memories: Memories = field(default_factory=dict)

    def add(self, packet: Packet) -> PackedMessage | None:
        """Return the message that *packet* completes, if it does.

        Raises:
            RemoteProtocolError: The packet is wrong; the rest of its message is skipped.
        """
        try:
            return self._begin(packet) if packet.kind == Kind.FIRST else self._continue(packet)
        except LocalProtocolError as error:
            self._open, self._is_skipping = None, True
            raise RemoteProtocolError(str(error)) from error
        except RemoteProtocolError:
            self._open, self._is_skipping = None, True
            raise

    def _begin(self, packet: Packet) -> PackedMessage | None:
        if self._open is not None:
            raise RemoteProtocolError("a new header before the last chunk of the message before")
        header, chunk = split_first(packet.payload)
        message, specs = wire.decode_header(header)
        kind = type(message).__name__
        if self.allowed and type(message) not in self.allowed:
            raise RemoteProtocolError(f"{kind} is not a message for this side")
        starts, lengths, total = _layout(specs)
        if total > self.max_message_bytes:
            raise RemoteProtocolError(
                f"{kind} announces {total} bytes, at most {self.max_message_bytes} are allowed"
            )
        check_tensors(message, {spec.name: spec for spec in specs})
        self._is_skipping = False
        opened = PackedMessage(message, specs, starts, lengths, total, len(header))
        return self._fill(opened, 0, chunk)

    def _continue(self, packet: Packet) -> PackedMessage | None:
        if self._open is not None:
            return self._fill(self._open, packet.place, packet.payload)
        if self._is_skipping:
            return None
        raise RemoteProtocolError("a chunk without a header")

    def _fill(self, opened: PackedMessage, place: int, chunk: memoryview) -> PackedMessage | None:
        """Add *chunk* to a message; return the message once it is complete."""
        end = opened.filled + len(chunk)
        if place != opened.filled or end > opened.total or (not chunk and opened.total):
            raise RemoteProtocolError(
                f"{type(opened.message).__name__}: chunk of {len(chunk)} bytes at"
                f" {place}, due at {opened.filled} of {opened.total}"
            )
        if opened.buffer is None and end == opened.total:  # the only one: use it where it lies
            opened.buffer = chunk
            return opened
        if opened.buffer is None:
            opened.buffer = np.empty(opened.total, np.uint8)
        opened.buffer[opened.filled : end] = np.frombuffer(chunk, np.uint8)
        opened.filled = end
        self._open = None if end == opened.total else opened
        return opened if end == opened.total else None

    def unpack(self, packed: PackedMessage, lane: int) -> Envelope:
        """Return a complete message with its tensors; those of a lane in their order.

        Raises:
            RemoteProtocolError: A tensor is not as its codec writes it.
        """
        tensors, kind = {}, type(packed.message)
        for spec, start, length in zip(packed.specs, packed.starts, packed.lengths, strict=True):
            part = packed.buffer[start : start + length] if length else b""
            memory = codecs.memory_of(spec.codec, self._memories, kind, spec.name)
            try:
                tensors[spec.name] = codecs.decode(part, spec.codec, spec.shape, memory)
            except LocalProtocolError as error:
                raise RemoteProtocolError(f"tensor {spec.name!r}: {error}") from error
        return Envelope(packed.message, tensors, packed.num_bytes, lane)
