"""Headers and packets: what comes out is what went in, or a RemoteProtocolError; nothing else."""

import contextlib
import dataclasses
import typing
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.names import Between
from edge_sdk.protocol import headers as wire
from edge_sdk.protocol import packets
from edge_sdk.protocol.fragments import Envelope, OutgoingMessage, Reassembler
from edge_sdk.protocol.messages import (
    MESSAGES,
    Activation,
    AdapterUpload,
    Hello,
    Paused,
    RoundStart,
    Stamp,
)
from edge_sdk.protocol.packets import PREFIX_BYTES, Kind, Packet

PAUSED = Paused(stamp=Stamp(run="r", device="d", step=3))
# A trainable head's parameters may have any name and shape.
UPLOAD = AdapterUpload(stamp=Stamp(run="r", device="d", step=3))


def header(**changes: Any) -> dict[str, Any]:
    """Return a good header as plain maps, with *changes*."""
    stamp = {"run": "", "device": "", "round": 0, "step": 0, "attempt": 0}
    return {"v": 1, "type": "Paused", "body": {"stamp": stamp}, "tensors": [], **changes}


# What is no letter is not read as it was sent: tests/coordinator/rounds/test_texts.py.
TEXT = st.text(max_size=20).filter(str.isprintable)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for what a field of *hint* may hold."""
    if typing.get_origin(hint) is typing.Annotated:
        form = typing.get_args(hint)[1]
        if isinstance(form, Between):
            return st.integers(form.least, form.most)
        return st.from_regex(rf"\A(?:{form.pattern})\Z")
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        return st.builds(hint, **{name: values(one) for name, one in hints.items()})
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0]), max_size=3).map(tuple)
    if typing.get_origin(hint) is dict:
        return st.dictionaries(TEXT, values(typing.get_args(hint)[1]), max_size=3)
    if type(None) in typing.get_args(hint):
        return st.none() | values(typing.get_args(hint)[0])
    return {
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: TEXT,
        bool: st.booleans(),
    }[hint]


@given(st.sampled_from(sorted(MESSAGES)).flatmap(lambda name: values(MESSAGES[name])))
@settings(max_examples=300, deadline=None)
def test_every_message_comes_back_equal(message: Any) -> None:
    """Each message of the protocol survives the trip with every field equal."""
    assert wire.decode_header(wire.encode_header(message)) == (message, ())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"v": 2}, r"version 2, this side speaks 1 \(edgesplit .*\); install the same version"),
        ({"v": True}, "version"),
        ({"type": "Nothing"}, r"unknown message type 'Nothing': none of version 1 \(edgesplit "),
        ({"type": 7}, "unknown message type"),
        ({"body": []}, "Expected `object`, got `array` - at `Paused`"),
        ({"body": {}}, "missing required field `stamp` - at `Paused`"),
        ({"type": "Goodbye"}, "missing required field `reason` - at `Goodbye`"),
        ({"body": {"stamp": {**header()["body"]["stamp"], "step": True}}}, "Paused.stamp.step"),
        ({"body": {"stamp": {**header()["body"]["stamp"], "step": 1.0}}}, "`int`, got `float`"),
        ({"body": {"stamp": {**header()["body"]["stamp"], "run": b"r"}}}, "not msgpack"),
        ({"tensors": {}}, "Expected `array`, got `object` - at `Paused.tensors`"),
        ({"tensors": [[0, "a", 99, [1]]]}, "tensors: codec 99"),
        ({"tensors": [[1, "a", 0, [1]]]}, "tensors: 1 shared"),
        (
            {"tensors": [[0, "a", 0, [-1]]]},
            r"Expected `int` >= 0 - at `Paused.tensors\[0\]\[3\]\[0\]`",
        ),
        ({"tensors": [[0, "a", 0, [True]]]}, "Expected `int`, got `bool`"),
        ({"tensors": [[0, "a", 0, [1] * 9]]}, "length <= 8"),
        ({"tensors": [[0, "a", 0, [1]], [0, "a", 0, [1]]]}, "the name 'a' is not new"),
    ],
)
def test_wrong_headers_say_what_is_wrong(changes: dict[str, Any], text: str) -> None:
    """Each way to break a header is refused with a text that names it."""
    with pytest.raises(RemoteProtocolError, match=text):
        wire.decode_header(msgpack.packb(header(**changes)))


def test_what_a_newer_version_adds_is_passed_over() -> None:
    """Unknown fields of a header, a body, a dataclass in it and a control frame are ignored."""
    stamp = {**dataclasses.asdict(PAUSED.stamp), "wave": [1, {"of": None}]}
    newer = {**header(body={"stamp": stamp, "because": "x"}), "trace": "y"}
    beat = {"sent_s": 1.0, "load": 0.5}
    frame = msgpack.packb(["BeatBack", beat])

    assert wire.decode_header(msgpack.packb(newer)) == (PAUSED, ())
    read = packets.read_control(Packet(Kind.CONTROL, 0, 0, 0, 0, memoryview(frame)))
    assert read == packets.HeartbeatAck(sent_s=1.0)


def test_what_an_older_version_lacks_has_its_default() -> None:
    """Fields with a default may be missing, and only these."""
    hello = {"stamp": {}, "protocol": 1, "sdk_version": "0", "codecs": ["float32"]}

    read, _ = wire.decode_header(msgpack.packb(header(type="Hello", body=hello)))

    assert read == Hello(stamp=Stamp(), protocol=1, sdk_version="0", codecs=("float32",))
    del hello["codecs"]
    with pytest.raises(RemoteProtocolError, match="missing required field `codecs` - at `Hello`"):
        wire.decode_header(msgpack.packb(header(type="Hello", body=hello)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), True, "1"])
def test_floats_must_be_finite_numbers(bad: Any) -> None:
    """NaN and infinity are refused on both sides, and neither bool nor text is a number."""
    good = dict(num_targets=1, num_sequences=1, num_tokens=1, compute_s=1, wait_s=0)
    report = MESSAGES["StepReport"](stamp=Stamp(), loss=bad, peak_bytes=1, **good)

    with pytest.raises(LocalProtocolError, match="loss"):
        wire.encode_header(report)
    plain = {"stamp": dataclasses.asdict(Stamp()), "loss": bad, "peak_bytes": 1, **good}
    with pytest.raises(RemoteProtocolError, match=r"(a finite number|`float`).* - at .*\.loss"):
        wire.decode_header(msgpack.packb(header(type="StepReport", body=plain)))


def test_hostile_msgpack_is_refused() -> None:
    """Lengths that lie, endless nesting, trailing bytes, repeated keys and size are all caught."""
    hostile = [
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 60_000,
        msgpack.packb(header()) + b"\x00",
        b"\x82\xa1v\x01\xa1v\x01",
        b"\xc7\x08\xff" + bytes(8),
        b"\xa2\xff\xff",
        bytes(wire.MAX_HEADER_BYTES + 1),
        b"",
    ]

    for data in hostile:
        with pytest.raises(RemoteProtocolError):
            wire.decode_header(data)


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes_raise_nothing_but_our_error(data: bytes) -> None:
    """No bytes from a peer cause any other exception, in a header, a packet or a control frame."""
    readers = (
        wire.decode_header,
        packets.read_packet,
        lambda view: packets.read_control(Packet(Kind.CONTROL, 0, 0, 0, 0, view)),
        lambda view: Reassembler(1000).add(Packet(Kind.FIRST, 0, 0, 0, 0, view)),
    )
    for read in readers:
        with contextlib.suppress(RemoteProtocolError):
            read(memoryview(data))


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_frames_raise_nothing_but_our_error(data: st.DataObject) -> None:
    """A good frame with some bytes changed or cut off is read, or refused with our error."""
    tensors = {"a": (np.ones((2, 3), np.float32), "bfloat16")}
    head = OutgoingMessage(UPLOAD, tensors).head
    frame = bytearray(packets.prefix(Kind.FIRST, 0, 1, 0, 0, len(head) + 12) + head + bytes(12))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))

    for view in (memoryview(frame), memoryview(frame)[:cut]):
        with contextlib.suppress(RemoteProtocolError):
            assembler = Reassembler(1000)
            packed = assembler.add(packets.read_packet(view))
            if packed is not None:
                assembler.unpack(packed, 0)


def test_a_packet_is_valid_msgpack() -> None:
    """Any msgpack reader finds the fields and the payload of a packet."""
    frame = packets.prefix(Kind.CHUNK, 1, 5, 6, 7, 3) + b"abc"

    assert msgpack.unpackb(frame) == [packets.FRAME_VERSION, Kind.CHUNK, 1, 5, 6, 7, b"abc"]
    assert PREFIX_BYTES % 8 == 0


def through(
    outgoing: OutgoingMessage, limit: int = 10**9, allowed: tuple[type, ...] = ()
) -> Envelope | None:
    """Send *outgoing* packet by packet through an assembler."""
    assembler, done = Reassembler(limit, allowed), None
    for number in range(outgoing.num_packets):
        size = outgoing.packet_bytes(number) - (0 if number else len(outgoing.head))
        chunk = np.full(size, 7, np.uint8)
        outgoing.write_chunk(number, chunk)
        payload = memoryview((b"" if number else outgoing.head) + chunk.tobytes())
        kind = Kind.CHUNK if number else Kind.FIRST
        assert done is None
        done = assembler.add(Packet(kind, 0, 0, number, outgoing.offset(number), payload))
    return None if done is None else assembler.unpack(done, 0)


@given(
    sizes=st.lists(st.integers(0, 60), max_size=6),
    chunk=st.integers(1, 300),
    codec=st.sampled_from(["float32", "bfloat16"]),
)
@settings(deadline=None)
def test_tensors_survive_any_cut(sizes: list[int], chunk: int, codec: str) -> None:
    """Whatever the tensors and the size of the chunks, every number arrives in its place."""
    arrays = {f"t{i}": np.arange(size, dtype=np.float32) + i for i, size in enumerate(sizes)}

    envelope = through(OutgoingMessage(UPLOAD, {n: (a, codec) for n, a in arrays.items()}, chunk))

    assert envelope is not None
    assert envelope.message == UPLOAD
    assert list(envelope.tensors) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(envelope.tensors[name], array)


def test_too_large_a_message_is_refused_before_memory_is_taken() -> None:
    """A header that announces more than allowed is refused, and its chunks are skipped."""
    big = OutgoingMessage(UPLOAD, {"a": (np.zeros(10_000, np.uint8), "uint8")}, 1024)
    assembler = Reassembler(5_000)
    chunk = bytes(1024)

    with pytest.raises(RemoteProtocolError, match="10000 bytes, at most 5000"):
        assembler.add(Packet(Kind.FIRST, 0, 0, 0, 0, memoryview(big.head + chunk)))

    assert assembler.add(Packet(Kind.CHUNK, 0, 0, 1, 1024, memoryview(chunk))) is None


def test_messages_for_the_other_side_are_refused() -> None:
    """A side accepts only the messages that are meant for it."""
    with pytest.raises(RemoteProtocolError, match="not a message for this side"):
        through(OutgoingMessage(PAUSED, {}), allowed=(Hello,))


def test_the_largest_honest_header_fits() -> None:
    """Four factors of seven weights in 128 blocks, with real names, need half a header at most."""
    weights = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    specs = tuple(
        wire.TensorSpec(
            f"model.layers.{block}.self_attn.{weight}.weight.{part}", "float32", (8192, 64)
        )
        for block in range(128)
        for weight in weights
        for part in "ABUV"
    )

    data = wire.encode_header(RoundStart(stamp=Stamp(), end_step=10, is_full=True), specs)

    assert len(data) < wire.MAX_HEADER_BYTES
    assert wire.decode_header(data)[1] == specs


def test_what_is_no_message_is_not_sent() -> None:
    """Objects outside the protocol, and wrong field types of ours, are our own fault."""
    with pytest.raises(LocalProtocolError, match="Stamp"):
        wire.encode_header(Stamp())
    with pytest.raises(LocalProtocolError, match="micro"):
        wire.encode_header(Activation(stamp=Stamp(), micro="1", num_micro=1, num_targets=1))  # type: ignore[arg-type]
