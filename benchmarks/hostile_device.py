"""One device of a run that does what none should; `hostile.py` starts it as a process.

    python benchmarks/hostile_device.py KIND DEVICE.yaml

It has a registered key. Some kinds never become members of a round: they send one thing as fast as
the coordinator takes it. The others are ordinary devices with one lie.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from edge_sdk.client.client import EdgeClient
from edge_sdk.client.config import ClientConfig
from edge_sdk.config.loader import load_config
from edge_sdk.deadline import Deadline
from edge_sdk.errors import EdgeError, ReceiveTimeout
from edge_sdk.protocol import packets
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import (
    PROTOCOL_VERSION,
    Activation,
    AdapterUpload,
    Failure,
    Hello,
    Message,
    PartRequest,
    PlanAssigned,
    Profiled,
    Ready,
    Stamp,
    StepReport,
    Welcome,
)
from edge_sdk.protocol.packets import Attach, Kind, Lane
from edge_sdk.protocol.session import Conversation
from edge_sdk.transport.keys import load_key_pair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from profiler.profile import DeviceProfile

# Between two attempts of a device that was sent away.
AGAIN_S = 0.05
# Messages after which a flood looks whether it has been sent away.
BURST = 100
NO_STAMP = Stamp()
HELLO = Hello(stamp=NO_STAMP, protocol=PROTOCOL_VERSION, sdk_version="0", codecs=("float32",))
Said = tuple[Message, Mapping[str, TensorOut]]


class Device:
    """What a hostile device has: a key, and where the coordinator is."""

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.keys = load_key_pair(config.secret_key)

    def link(self) -> ZmqLink:
        """Open a session, as an honest device does."""
        config = self.config
        return ZmqLink(
            LinkConfig(
                address=config.coordinator, server_key=str(config.server_key), keys=self.keys
            )
        )

    def socket(self, context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
        """Open a connection that says nothing by itself."""
        socket = context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndtimeo = 200
        socket.curve_serverkey = str(self.config.server_key).encode()
        socket.curve_publickey = self.keys.public.encode()
        socket.curve_secretkey = self.keys.secret.encode()
        socket.connect(self.config.coordinator)
        return socket


def joined(link: ZmqLink) -> tuple[Welcome, PlanAssigned]:
    """Say hello and wait for the plan."""
    link.send(HELLO)
    found: dict[type, Any] = {}
    deadline = Deadline.after(30.0)
    while not {Welcome, PlanAssigned} <= found.keys():
        message = link.receive(deadline).message
        found[type(message)] = message
    return found[Welcome], found[PlanAssigned]


def flood(device: Device, say: Callable[[Welcome, PlanAssigned], Said], *, reads: bool) -> None:
    """Say one thing again and again in one session, until it ends."""
    with device.link() as link:
        welcome, assigned = joined(link)
        message, tensors = say(welcome, assigned)
        while True:
            for _ in range(BURST):
                link.send(message, tensors)
            try:
                while reads:
                    link.receive(Deadline.after(0.0))
            except ReceiveTimeout:
                time.sleep(0.001)


def hellos(_welcome: Welcome, _assigned: PlanAssigned) -> Said:
    """Nothing but greetings."""
    return HELLO, {}


def profiles(welcome: Welcome, _assigned: PlanAssigned) -> Said:
    """Measurements that nobody asked for."""
    profile = DeviceProfile(memory_bytes=1e9, flops_per_s=1e9)
    return Profiled(stamp=welcome.stamp, profile=profile), {}


def parts(welcome: Welcome, assigned: PlanAssigned) -> Said:
    """Requests for the largest part."""
    part = max(assigned.parts, key=lambda each: each.num_bytes)
    return PartRequest(stamp=welcome.stamp, sha256=part.sha256, offset=0), {}


def evaluations(welcome: Welcome, assigned: PlanAssigned) -> Said:
    """Hidden states to be evaluated, when no evaluation is due."""
    hidden = np.ones((assigned.plan.micro_batch, 64, 128), np.float32)
    lengths = np.full(assigned.plan.micro_batch, 64, np.int32)
    values: dict[str, Any] = {"micro": 0, "num_micro": 1, "num_targets": 1, "is_eval": True}
    tensors: dict[str, TensorOut] = {"hidden": (hidden, "float32"), "lengths": (lengths, "int32")}
    return Activation(stamp=welcome.stamp, **values), tensors


def failures(welcome: Welcome, _assigned: PlanAssigned) -> Said:
    """Long texts for terminals and logs."""
    text = "\x1b[2J\u202e" * 6000
    return Failure(stamp=welcome.stamp, error="OutOfMemory", text=text), {}


def readies(welcome: Welcome, _assigned: PlanAssigned) -> Said:
    """Joins that are never followed by work."""
    return Ready(stamp=welcome.stamp, vocab_size=1, num_samples=1, held_steps=()), {}


def frames(device: Device, frame: Callable[[Conversation, int], list[bytes]]) -> None:
    """Send frames that no device of ours sends, as fast as they are taken."""
    context = zmq.Context()
    talk = Conversation(secrets.token_hex(16), 10**6)
    with device.socket(context) as socket:
        attach = Attach(
            session=talk.session, is_resumed=False, sdk_version="", name="", ack=talk.ack()
        )
        socket.send(packets.control_frame(attach, Lane.CONTROL, talk.tag))
        for number in range(10**9):
            try:
                socket.send_multipart(frame(talk, number))
            except zmq.Again:
                return


def garbage(_talk: Conversation, number: int) -> list[bytes]:
    """Random bytes."""
    return [os.urandom(number % 200)]


def many_parts(_talk: Conversation, _number: int) -> list[bytes]:
    """One message of 300 megabyte frames."""
    return [bytes(10**6)] * 300


def never_first(talk: Conversation, number: int) -> list[bytes]:
    """Messages that wait for one that does not come."""
    prefix = packets.prefix(Kind.FIRST, Lane.CONTROL, talk.tag, number, number + 1, 200)
    return [prefix + bytes(200)]


def attaches(talk: Conversation, _number: int) -> list[bytes]:
    """A new session with each frame."""
    fresh = Conversation(secrets.token_hex(16), 10**6)
    control = Attach(
        session=fresh.session, is_resumed=False, sdk_version="", name="", ack=talk.ack()
    )
    return [packets.control_frame(control, Lane.CONTROL, fresh.tag)]


def uploads(value: float) -> Callable[[Message, Mapping[str, TensorOut]], Said]:
    """Return what fills factors with *value*."""

    def change(message: Message, tensors: Mapping[str, TensorOut]) -> Said:
        if isinstance(message, AdapterUpload):
            tensors = {n: (np.full_like(t, value), codec) for n, (t, codec) in tensors.items()}
        return message, tensors

    return change


def targets(count: int) -> Callable[[Message, Mapping[str, TensorOut]], Said]:
    """Return what says so many targets, whatever there are."""

    def change(message: Message, tensors: Mapping[str, TensorOut]) -> Said:
        if isinstance(message, Activation):
            message = replace(message, num_targets=count)
        return message, tensors

    return change


def losses(message: Message, tensors: Mapping[str, TensorOut]) -> Said:
    """A loss that makes every mean infinite."""
    if isinstance(message, StepReport):
        message = replace(message, loss=1e308)
    return message, tensors


def lie(device: Device, change: Callable[[Message, Mapping[str, TensorOut]], Said]) -> None:
    """Be an ordinary device, with one lie."""
    send = ZmqLink.send

    def sent(link: ZmqLink, message: Message, tensors: Mapping[str, TensorOut] = {}) -> None:  # noqa: B006
        send(link, *change(message, tensors))

    ZmqLink.send = sent  # type: ignore[method-assign]
    EdgeClient(device.config).run()


# Of these kinds the others' result must not show one bit.
OUTSIDE: dict[str, Callable[[Device], None]] = {
    "hellos": lambda device: flood(device, hellos, reads=True),
    "profiles": lambda device: flood(device, profiles, reads=True),
    "parts": lambda device: flood(device, parts, reads=True),
    "parts, unread": lambda device: flood(device, parts, reads=False),
    "evaluations": lambda device: flood(device, evaluations, reads=True),
    "texts": lambda device: flood(device, failures, reads=True),
    "garbage": lambda device: frames(device, garbage),
    "many parts": lambda device: frames(device, many_parts),
    "never first": lambda device: frames(device, never_first),
    "attaches": lambda device: frames(device, attaches),
}
# These take part in rounds, so that they teach something before they lie.
MEMBERS: dict[str, Callable[[Device], None]] = {
    "readies": lambda device: flood(device, readies, reads=True),
    "upload 3e38": lambda device: lie(device, uploads(3e38)),
    "upload 1e18": lambda device: lie(device, uploads(1e18)),
    "upload 10": lambda device: lie(device, uploads(10.0)),
    "1 target": lambda device: lie(device, targets(1)),
    "2^62 targets": lambda device: lie(device, targets(2**62)),
    "loss 1e308": lambda device: lie(device, losses),
}
KINDS = {**OUTSIDE, **MEMBERS}


def attempts(act: Callable[[Device], None], device: Device) -> Iterator[str]:
    """Do it again whenever the coordinator has sent us away; yield why."""
    while True:
        try:
            act(device)
            yield "over"
        except EdgeError as error:
            yield f"{type(error).__name__}: {error}"
        time.sleep(AGAIN_S)


def main() -> None:
    """Be hostile until somebody ends this process."""
    # Another machine's processor does this work: here it gets what nobody else wants.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    kind, path = sys.argv[1:]
    os.chdir(Path(path).parent)
    device = Device(load_config(ClientConfig, Path(path), [], env={}))
    last = ""
    for times, why in enumerate(attempts(KINDS[kind], device), 1):
        if why != last:
            print(f"{times}: {why[:300]!r}", flush=True)
            last = why


if __name__ == "__main__":
    main()
