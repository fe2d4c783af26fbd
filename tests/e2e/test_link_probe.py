"""Measuring the link over real sockets, encryption and the coordinator's own loop included."""

from __future__ import annotations

import threading

import pytest

from edge_sdk.client.incoming import Inbox
from edge_sdk.client.link_speed import probe
from edge_sdk.client.states import State
from edge_sdk.errors import EdgeError
from edge_sdk.protocol.messages import MAX_PROBES, PROTOCOL_VERSION, Hello, Probe, Stamp, Welcome
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import Cluster


def welcomed(link: ZmqLink) -> tuple[Inbox, Stamp]:
    """Greet the coordinator; returns what arrives, and the stamp of the run."""
    inbox = Inbox(link, threading.Event())
    blank = Stamp()
    link.send(Hello(stamp=blank, protocol=PROTOCOL_VERSION, sdk_version="0", codecs=("float32",)))
    stamp = inbox.wait_for(Welcome).message.stamp
    inbox.enter(State.PROFILING)
    return inbox, stamp


def test_a_real_link_is_measured(cluster: Cluster) -> None:
    """Right after Welcome: positive numbers, within the bytes and probes that are allowed."""
    cluster.serve(cluster.config(min_devices=2)).start()
    link = cluster.link("a")
    inbox, stamp = welcomed(link)

    first = probe(link, inbox, stamp)
    again = probe(link, inbox, stamp)

    for found in (first, again):
        assert 0 < found.round_trip_s < 5.0
        assert found.up_bytes_per_s > 1e5
        assert found.down_bytes_per_s > 1e5
    assert link.stats().bytes_up < 12 * 2**20


def test_who_probes_without_end_is_expelled(cluster: Cluster) -> None:
    """The device is told why, and the coordinator goes on."""
    cluster.serve(cluster.config(min_devices=2)).start()
    link = cluster.link("a")
    inbox, stamp = welcomed(link)
    for _ in range(MAX_PROBES + 1):
        link.send(Probe(stamp=stamp))
    for _ in range(MAX_PROBES):
        inbox.wait_for(Probe)

    with pytest.raises(EdgeError, match="more than 48 probes"):
        inbox.wait_for(Probe)

    other = cluster.link("b")
    welcomed(other)


def test_a_probe_before_hello_is_refused(cluster: Cluster) -> None:
    """A registered key alone makes the coordinator send nothing."""
    cluster.serve(cluster.config(min_devices=2)).start()
    link = cluster.link("c")
    link.send(Probe(stamp=Stamp(), answer_bytes=1))

    with pytest.raises(EdgeError, match="Probe before Hello"):
        Inbox(link, threading.Event()).wait_for(Welcome)
