"""A run over links that lose bytes and look alive stands still for a moment; nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edge_sdk.transport.keys import load_key_pair
from edge_sdk.transport.link import LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import Cluster, Serving, Trap, sentences, wait_all
from tests.e2e.relay import Relay


def set_up(cluster: Cluster, folder: str) -> tuple[Trap, Serving]:
    """A run of three rounds that is not started yet."""
    trap = Trap()
    cluster.address = "tcp://127.0.0.1:*"
    runs, state = cluster.folder / folder, cluster.folder / folder / "state"
    state.mkdir(parents=True)
    return trap, cluster.serve(cluster.config(rounds=3, runs=runs, patience_s=60.0), trap=trap)


def train(cluster: Cluster, serving: Serving, address: str, folder: str) -> bytes:
    """Let all devices train over *address*; returns the metrics of the run."""
    serving.start()
    clients = []
    for name in cluster.names:
        keys = load_key_pair(cluster.folder / f"{name}.key")
        config = LinkConfig(
            address=address, server_key=cluster.public, keys=keys, beat_s=0.2, lifeless_s=1.0
        )
        state = cluster.folder / folder / "state"
        client = cluster.client(name, sentences(ord(name)), None, ZmqLink(config), state=state)
        clients.append(client.start())
    wait_all(clients)
    assert serving.wait() == "completed"
    return serving.metrics


@pytest.fixture
def undisturbed(cluster: Cluster) -> bytes:
    """The metrics of a run whose links lose nothing."""
    _, serving = set_up(cluster, "undisturbed")
    return train(cluster, serving, cluster.address, "undisturbed")


def test_swallowed_bytes_change_nothing(cluster: Cluster, undisturbed: bytes) -> None:
    """In mid-round and between rounds, both ways and each alone: the same metrics."""
    trap, serving = set_up(cluster, "disturbed")
    with Relay(cluster.address) as relay:
        orders: dict[int, Callable[[], None]] = {
            2: relay.swallow,  # in the first round
            5: lambda: relay.swallow(directions=("down",)),
            8: relay.reset,
        }
        trap.on_step = lambda _, report: orders.pop(report.stamp.step, lambda: None)()
        trap.on_row = lambda row: relay.swallow(directions=("up",)) if row["round"] == 2 else None
        disturbed = train(cluster, serving, relay.address, "disturbed")

    assert not orders
    assert disturbed == undisturbed
    assert not [note for note in trap.notes if "left" in note]
