"""Frames and messages that nobody expects, by the million: who survives, how fast, how much memory.

    python benchmarks/fuzz.py                                 # 10 million, about half an hour
    python benchmarks/fuzz.py --frames 100000 --messages 5000 --no-write

Frames go to what the gateway reads them with, a thousand to a conversation: honest ones of every
message and every control frame, with bits flipped, cut, joined and repeated. Nothing but the one
error that blames the sender may come of them. Messages go into whole runs, of every kind in turn,
beside two honest devices: each run must come to its end, and the honest ones must learn the same to
the last bit (`tests/coordinator/rounds/siege.py`, which the tests use as well).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from report import header, save, table

from coordinator.rounds.device_states import DeviceState
from edge_sdk.errors import LocalProtocolError, RemoteProtocolError
from edge_sdk.protocol import packets
from edge_sdk.protocol.fragments import OutgoingMessage
from edge_sdk.protocol.messages import FROM_DEVICE, Stamp
from edge_sdk.protocol.packets import CONTROL_FRAMES, PREFIX_BYTES, Kind
from edge_sdk.protocol.session import Conversation
from tests.coordinator.rounds.siege import (
    FORMS,
    besieged,
    drawn_case,
    extreme,
    run_under_siege,
)

SESSION = "0" * 32
LIMIT_BYTES = 2**20
# Frames of one conversation: then another one begins, as after an expulsion.
TALK_FRAMES = 1000
CORPUS_SEEDS = 400
# Messages that are drawn for one run; more than a run takes.
RUN_CASES = 400
MIB = 2**20


class Found(NamedTuple):
    """What has come of one kind of fuzzing."""

    cases: int
    seconds: float
    survived: int
    """Conversations, or runs, that went on as they ought to."""
    failed: list[str]
    resident_bytes: tuple[int, int]
    """Before and after."""
    met: Counter[Any]


def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def corpus() -> list[bytes]:
    """Return honest frames of everything that a device can send, and of control frames."""
    found = []
    draw = random.Random(0)
    for seed in range(CORPUS_SEEDS):
        case = drawn_case(seed)
        message = case.kind(stamp=case.stamp or Stamp(), **case.fields)
        tensors = {n: (a, str(a.dtype)) for n, a in case.tensors.items()}
        try:
            outgoing = OutgoingMessage(message, tensors)
        except LocalProtocolError:
            continue
        talk = Conversation(SESSION, LIMIT_BYTES, FROM_DEVICE)
        lane = talk.send(outgoing)
        while (due := talk.senders[lane].peek(0.0)) is not None:
            found.append(bytes(talk.frame(lane, due)))
            talk.senders[lane].sent(due)
    for kind in CONTROL_FRAMES.values():
        found += [_control(kind, draw) for _ in range(20)]
    return [frame for frame in found if len(frame) < 8192]


def _control(kind: type, draw: random.Random) -> bytes:
    while True:
        try:
            return packets.control_frame(extreme(draw, kind))
        except LocalProtocolError:
            continue


def mutated(frames: list[bytes], draw: random.Random, seq: int) -> bytes:
    """Return a frame as nobody writes it; most of them still begin like a packet."""
    frame = bytearray(draw.choice(frames))
    way = draw.randrange(8)
    if way < 4:
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(len(frame))
            frame[at] ^= 1 << draw.randrange(8)
    elif way == 4:
        del frame[draw.randrange(len(frame)) :]
    elif way == 5:
        other = draw.choice(frames)
        frame = frame[: draw.randrange(len(frame))] + other[draw.randrange(len(other)) :]
    elif way == 6:
        at = draw.randrange(len(frame))
        frame[at:at] = draw.randbytes(draw.randrange(64))
    return _whole(frame, draw, seq) if draw.random() < 0.8 else bytes(frame)


def _whole(frame: bytearray, draw: random.Random, seq: int) -> bytes:
    """Return *frame* with the prefix of a packet that is due, so that its payload is read."""
    payload = bytes(frame[PREFIX_BYTES:])
    kind = frame[2] if len(frame) > 2 and 1 <= frame[2] <= 3 else draw.randrange(1, 4)
    place = seq if kind == Kind.FIRST else draw.choice((0, 64, 2**20, 2**63))
    return packets.prefix(kind, draw.randrange(2), 0, seq, place, len(payload)) + payload


def fuzz_frames(number: int, seed: int) -> Found:
    """Let conversations read frames; only an error that blames the sender may come of it."""
    frames, draw = corpus(), random.Random(seed)
    met, failed = Counter[str](), list[str]()
    survived, before, began_s = 0, resident_bytes(), time.monotonic()
    for start in range(0, number, TALK_FRAMES):
        talk = Conversation(SESSION, LIMIT_BYTES, FROM_DEVICE)
        for _ in range(min(TALK_FRAMES, number - start)):
            seq = talk.receivers[draw.randrange(2)].next_seq
            frame = mutated(frames, draw, seq)
            try:
                met[_read(talk, frame)] += 1
            except RemoteProtocolError:
                met["refused"] += 1
            except Exception as error:  # noqa: BLE001 - what is looked for
                failed.append(f"{type(error).__name__}: {error}: {frame.hex()[:400]}")
        survived += 1
    seconds = time.monotonic() - began_s
    return Found(number, seconds, survived, failed, (before, resident_bytes()), met)


def _read(talk: Conversation, frame: bytes) -> str:
    """Read a frame as the gateway does; return what it was."""
    packet = packets.read_packet(memoryview(frame))
    if packet.kind == Kind.CONTROL:
        control = packets.read_control(packet)
        if isinstance(control, packets.Ack):
            talk.on_ack(control, 0.0)
        return "control frame"
    for item in talk.on_packet(packet):
        if hasattr(item, "num_bytes"):
            talk.taken(item.lane, item.num_bytes)
        return type(item).__name__
    return "part of a message"


def fuzz_messages(number: int, seed: int, folder: Path) -> Found:
    """Let runs of all kinds take messages in; honest devices must not notice."""
    served = {form: besieged(form, folder) for form in FORMS}
    alone = {
        form: run_under_siege(one, _fresh(folder), iter(()), 0).learned
        for form, one in served.items()
    }
    draw, met, failed = random.Random(seed), Counter[tuple[str, str]](), list[str]()
    cases = survived = 0
    before, began_s = resident_bytes(), time.monotonic()
    for form in itertools.cycle(FORMS):
        if cases >= number:
            break
        run_seed = draw.getrandbits(32)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            outcome = run_under_siege(served[form], Path(fresh), _drawn(run_seed))
        cases += outcome.num_sent
        met.update(outcome.reached)
        is_well = outcome.outcome == "completed" and outcome.learned == alone[form]
        if is_well and not outcome.unforeseen:
            survived += 1
        else:
            failed.append(f"{form}, seed {run_seed}: {outcome.outcome} {outcome.unforeseen}")
    seconds = time.monotonic() - began_s
    return Found(cases, seconds, survived, failed, (before, resident_bytes()), met)


def _fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def _drawn(seed: int) -> Iterator[Any]:
    draw = random.Random(seed)
    return (drawn_case(draw.getrandbits(32)) for _ in range(RUN_CASES))


def row(name: str, found: Found) -> tuple[object, ...]:
    """Return one line of the table."""
    first, last = found.resident_bytes
    return (
        name,
        f"{found.cases:,}",
        f"{found.cases / max(1e-9, found.seconds):,.0f}",
        f"{found.survived:,}",
        len(found.failed),
        f"{first / MIB:.0f}",
        f"{(last - first) / MIB:+.0f}",
    )


def main() -> None:
    """Fuzz, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=9_000_000)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-write", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    frames = fuzz_frames(options.frames, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        messages = fuzz_messages(options.messages, options.seed, Path(folder))
    heads = ("what", "cases", "a second", "survivors", "failures", "MiB", "growth in MiB")
    text = [
        header("Frames and messages that nobody expects", options),
        table(heads, [row("frames", frames), row("messages", messages)]),
        "Survivors are conversations of a thousand frames, and runs whose honest devices learned "
        "the same to the last bit.",
        "Frames read as: " + ", ".join(f"{what} {n:,}" for what, n in frames.met.most_common()),
        f"{len(messages.met)} pairs of a message with a state of its device and a phase of the "
        f"run, of {len(FROM_DEVICE)} messages and {len(DeviceState)} states.",
        *(f"* {line}" for line in (frames.failed + messages.failed)[:20]),
    ]
    print("\n\n".join(text))
    if not options.no_write:
        save("fuzz", "\n\n".join(text))
    if frames.failed or messages.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
