"""MB/s of float32 tensors: ZmqLink -> Gateway against raw pyzmq with the same socket settings.

    python benchmarks/wire.py                    # all sizes, CURVE on and off, about five minutes
    python benchmarks/wire.py --sizes 1024 --repeats 3 --no-write

Sender and receiver are separate processes on loopback TCP. Raw sends one message per tensor with
copy=False and makes an ndarray of what it receives. Timed at the receiver, from the end of the
warm-up to the last tensor, after which it still checks the content. Raw and ours take turns, so
that a busy neighbour hits both; the number is the median.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from report import header, save, table

from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.interface import Received
from coordinator.gateway.keys.allow_list import AllowList
from edge_sdk.protocol.messages import AdapterUpload, Stamp
from edge_sdk.protocol.packets import MAX_CHUNK_BYTES
from edge_sdk.transport.keys import KeyPair, make_key_pair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.sockets import tune
from edge_sdk.transport.zmq_link import ZmqLink

KIB = 1024
SIZES_KIB = (64, 256, 1024, 4096, 16384, 65536)
# Buffers grow and pages are touched for the first time in the beginning; a run goes on for hours.
WARM_UP_BYTES = 256 * KIB * KIB
# More than any cache of the machines that we know.
CACHE_BYTES = 128 * KIB * KIB
MOST_BYTES = 1024 * KIB * KIB
MOST_TENSORS = 20000


def tensor(size_bytes: int) -> np.ndarray:
    """Return something that is not all zeros."""
    return np.arange(size_bytes // 4, dtype=np.float32)


def tensors(size_bytes: int) -> list[np.ndarray]:
    """Return so many of them that none is still in a cache when its turn comes, as in training."""
    return [tensor(size_bytes) for _ in range(max(2, CACHE_BYTES // size_bytes))]


def warm_up(size: int) -> int:
    """Tensors before the clock starts."""
    return max(4, min(WARM_UP_BYTES // size, 1000))


def raw_receiver(pipe: Any, server: KeyPair | None, size: int, count: int) -> None:
    """Receive *count* tensors with nothing but pyzmq and say how long it took."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    tune(router)
    router.setsockopt(zmq.MAXMSGSIZE, size + 64 * KIB)
    if server is not None:
        router.curve_server = True
        router.curve_secretkey = server.secret.encode()
    router.bind("tcp://127.0.0.1:*")
    pipe.send(router.getsockopt_string(zmq.LAST_ENDPOINT))
    begin_s = 0.0
    for number in range(warm_up(size) + count):
        router.recv()
        frame = router.recv(copy=False)
        array = np.frombuffer(frame.buffer, np.float32)
        if number == warm_up(size) - 1:
            begin_s = time.perf_counter()
    taken_s = time.perf_counter() - begin_s
    assert (array == tensor(size)).all()
    pipe.send(taken_s)
    context.destroy(0)


def raw_sender(address: str, server: KeyPair | None, size: int, count: int, done: Any) -> None:
    """Send *count* tensors with nothing but pyzmq."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    tune(dealer)
    if server is not None:
        keys = make_key_pair()
        dealer.curve_serverkey = server.public.encode()
        dealer.curve_publickey = keys.public.encode()
        dealer.curve_secretkey = keys.secret.encode()
    dealer.connect(address)
    arrays = tensors(size)
    for step in range(warm_up(size) + count):
        dealer.send(arrays[step % len(arrays)], copy=False)
    done.wait()
    context.destroy(0)


def our_receiver(
    pipe: Any, server: KeyPair | None, device: KeyPair, size: int, count: int, folder: str
) -> None:
    """Receive *count* tensors through the gateway and say how long it took."""
    allowed = None
    if server is not None:
        allowed = AllowList(Path(folder) / "allowed.json")
        allowed.register("bench", device.public)
    config = GatewayConfig(
        address="tcp://127.0.0.1:*",
        keys=server,
        insecure=server is None,
        max_message_bytes=size + KIB,
    )
    with ZmqGateway(config, allowed) as gateway:
        pipe.send(gateway.address)
        begin_s, number = 0.0, 0
        while number < warm_up(size) + count:
            for event in gateway.events(10.0):
                if isinstance(event, Received):
                    array = event.envelope.tensors["hidden"]
                    number += 1
                    if number == warm_up(size):
                        begin_s = time.perf_counter()
        taken_s = time.perf_counter() - begin_s
        assert (array == tensor(size)).all()
        pipe.send(taken_s)
        pipe.recv()


def our_sender(
    address: str,
    server: KeyPair | None,
    device: KeyPair,
    size: int,
    count: int,
    chunk: int,
    done: Any,
) -> None:
    """Send *count* tensors through a link."""
    config = LinkConfig(
        address=address,
        server_key=server.public if server is not None else "",
        keys=device if server is not None else None,
        name="bench",
        chunk_bytes=chunk,
    )
    arrays = tensors(size)
    with ZmqLink(config) as link:
        for step in range(warm_up(size) + count):
            link.send(
                AdapterUpload(stamp=Stamp(step=step)),
                {"hidden": (arrays[step % len(arrays)], "float32")},
            )
        done.wait()


def measure(kind: str, size: int, *, curve: bool, chunk: int) -> float:
    """Return MB/s (10^6) of one run."""
    count = max(6, min(MOST_TENSORS, MOST_BYTES // size))
    server, device = (make_key_pair() if curve else None), make_key_pair()
    here, there = multiprocessing.Pipe()
    done = multiprocessing.Event()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "raw":
            args: tuple[Any, ...] = (there, server, size, count)
            receiver = multiprocessing.Process(target=raw_receiver, args=args)
        else:
            args = (there, server, device, size, count, folder)
            receiver = multiprocessing.Process(target=our_receiver, args=args)
        receiver.start()
        address = here.recv()
        if kind == "raw":
            args = (address, server, size, count, done)
            sender = multiprocessing.Process(target=raw_sender, args=args)
        else:
            args = (address, server, device, size, count, chunk, done)
            sender = multiprocessing.Process(target=our_sender, args=args)
        sender.start()
        taken_s = here.recv()
        done.set()
        sender.join()
        if kind != "raw":
            here.send("stop")
        receiver.join()
    return count * size / taken_s / 1e6


def report(rows: list[tuple[int, bool, list[float], list[float]]], args: Any) -> str:
    """Return the page of results."""
    cells = [
        (
            f"{size} KiB",
            "on" if curve else "off",
            f"{statistics.median(raw):.0f} ({min(raw):.0f}-{max(raw):.0f})",
            f"{statistics.median(ours):.0f} ({min(ours):.0f}-{max(ours):.0f})",
            f"{statistics.median(ours) / statistics.median(raw):.2f}",
        )
        for size, curve, raw, ours in rows
    ]
    text = (
        f"Loopback TCP, packets of {args.chunk} KiB, load average at the end "
        f"{os.getloadavg()[0]:.1f}. Median of {args.repeats} runs, raw and ours in turn; in "
        "brackets lowest and highest. Target: at least 0.8 x raw."
    )
    heads = ("tensor", "CURVE", "raw MB/s", "ours MB/s", "ours / raw")
    title = "Wire throughput: ZmqLink -> Gateway against raw pyzmq"
    return "\n\n".join([header(title, args), text, table(heads, cells)])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES_KIB), help="in KiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--curve", choices=["on", "off", "both"], default="both")
    parser.add_argument("--chunk", type=int, default=MAX_CHUNK_BYTES // KIB, help="in KiB")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    rows = []
    for curve in {"on": [True], "off": [False], "both": [False, True]}[args.curve]:
        for size in args.sizes:
            raw, ours = [], []
            for _ in range(args.repeats):
                raw.append(measure("raw", size * KIB, curve=curve, chunk=args.chunk * KIB))
                ours.append(measure("ours", size * KIB, curve=curve, chunk=args.chunk * KIB))
            rows.append((size, curve, raw, ours))
            print(report(rows[-1:], args).splitlines()[-1], flush=True)
    if not args.no_write:
        save("wire", report(rows, args))


if __name__ == "__main__":
    main()
