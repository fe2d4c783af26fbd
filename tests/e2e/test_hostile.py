"""A device that sends nonsense is expelled with a typed error; the others finish the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import zmq

from coordinator.aggregation import round_start
from edge_sdk import errors
from edge_sdk.deadline import Deadline
from edge_sdk.errors import EdgeError, ReceiveTimeout, RemoteProtocolError
from edge_sdk.protocol.fragments import TensorOut
from edge_sdk.protocol.messages import (
    PROTOCOL_VERSION,
    Activation,
    AdapterUpload,
    EvalReport,
    Failure,
    Gradient,
    Hello,
    Message,
    PlanAssigned,
    Ready,
    RoundStart,
    Stamp,
    StepReport,
    TopGradient,
    TopHidden,
    Welcome,
)
from edge_sdk.protocol.plan import Plan
from edge_sdk.transport.keys import load_key_pair
from edge_sdk.transport.zmq_link import ZmqLink
from tests.e2e.cluster import Cluster, wait_all
from tests.tiny import VOCAB

HIDDEN = 32
Said = tuple[Message, Mapping[str, TensorOut]]


class Case(NamedTuple):
    """What a device does wrong in its first round, and how that ends."""

    error: str
    words: str
    say: Callable[[Stamp, Plan], Said]


def activation(**changes: Any) -> Callable[[Stamp, Plan], Said]:
    """An activation as it should be, but for *changes*."""

    def say(stamp: Stamp, plan: Plan) -> Said:
        tensors: dict[str, TensorOut] = {
            "hidden": (np.ones((plan.micro_batch, 6, HIDDEN), np.float32), "float32"),
            "lengths": (np.full(plan.micro_batch, 6, np.int32), "int32"),
            "labels": (np.full((plan.micro_batch, 6), 5, np.int32), "int32"),
        }
        values = {"micro": 0, "num_micro": 1, "num_targets": 20, "stamp": stamp}
        for name, value in changes.items():
            if name == "step":
                values["stamp"] = Stamp(
                    run=stamp.run, device=stamp.device, attempt=stamp.attempt, step=value
                )
            elif name in tensors or isinstance(value, tuple):
                tensors[name] = value
            else:
                values[name] = value
        return Activation(**values), {n: t for n, t in tensors.items() if t[1]}

    return say


def hidden(*shape: int, value: float = 1.0, dtype: str = "float32") -> TensorOut:
    """A hidden state filled with *value*."""
    return np.full(shape, value, np.float32), dtype


def five_rows() -> dict[str, TensorOut]:
    """Tensors of one sequence more than the plan allows."""
    lengths, labels = np.full(5, 6, np.int32), np.full((5, 6), 5, np.int32)
    return {
        "hidden": hidden(5, 6, HIDDEN),
        "lengths": (lengths, "int32"),
        "labels": (labels, "int32"),
    }


def upload(value: float) -> Callable[[Stamp, Plan], Said]:
    """Factors filled with *value*."""

    def say(stamp: Stamp, plan: Plan) -> Said:
        tensors: dict[str, TensorOut] = {}
        for name, rank in plan.ranks.items():
            wide = 48 if "down_proj" in name else HIDDEN
            tall = 48 if "gate" in name or "up_proj" in name else HIDDEN
            tall = 16 if "k_proj" in name or "v_proj" in name else tall
            tensors[f"{name}.A"] = (np.full((rank, wide), value, np.float32), "float32")
            tensors[f"{name}.B"] = (np.full((tall, rank), value, np.float32), "float32")
        return AdapterUpload(stamp=stamp), tensors

    return say


def report(**changes: Any) -> Callable[[Stamp, Plan], Said]:
    """A step report with *changes*."""
    values = {"loss": 1.0, "num_targets": 1, "num_sequences": 1, "num_tokens": 1}
    values |= {"compute_s": 0.0, "wait_s": 0.0, "peak_bytes": 0, **changes}
    return lambda stamp, _plan: (StepReport(stamp=stamp, **values), {})


def gradient(stamp: Stamp, plan: Plan) -> Said:
    """A gradient that nobody asked for."""
    return TopGradient(stamp=stamp, micro=0), {"grad": hidden(plan.micro_batch, 6, HIDDEN)}


def evaluation(stamp: Stamp, _plan: Plan) -> Said:
    """More right answers than questions."""
    return EvalReport(stamp=stamp, loss_sum=1.0, num_targets=1, num_correct=2), {}


NUMERIC, REMOTE = "NumericError", "RemoteProtocolError"
CASES: dict[str, Case] = {
    "nan": Case(NUMERIC, "hidden", activation(hidden=hidden(4, 6, HIDDEN, value=math.nan))),
    "inf": Case(NUMERIC, "hidden", activation(hidden=hidden(4, 6, HIDDEN, value=math.inf))),
    "huge": Case(NUMERIC, "gradient", activation(hidden=hidden(4, 6, HIDDEN, value=3.3e38))),
    "width": Case(REMOTE, "size 31", activation(hidden=hidden(4, 6, 31))),
    "flat": Case(REMOTE, "hidden", activation(hidden=hidden(4, HIDDEN))),
    "rows": Case(REMOTE, "the plan allows 4", activation(**five_rows())),
    "dtype": Case(REMOTE, "int32", activation(hidden=(np.ones((4, 6, HIDDEN), np.int32), "int32"))),
    "too-much": Case(REMOTE, "bytes", activation(hidden=hidden(4, 6000, HIDDEN))),
    "no-lengths": Case(
        REMOTE, "'lengths': missing", activation(lengths=(np.ones(4, np.int32), ""))
    ),
    "lengths": Case(REMOTE, "lengths", activation(lengths=(np.full(4, 7, np.int32), "int32"))),
    "labels": Case(
        REMOTE, "labels", activation(labels=(np.full((4, 6), VOCAB, np.int32), "int32"))
    ),
    "targets": Case(REMOTE, "num_targets", activation(num_targets=0)),
    "micros": Case(REMOTE, "micro-batch", activation(num_micro=3)),
    "future": Case(REMOTE, "step 40", activation(step=40)),
    "gradient": Case(REMOTE, "TopGradient", gradient),
    "upload": Case(NUMERIC, "upload", upload(math.nan)),
    **{
        f"upload-{value:g}".replace("+", ""): Case(NUMERIC, "beyond all measure", upload(value))
        for value in (1e5, 1e12, 1e19, 3.3e38)
    },
    "counts": Case(REMOTE, "negative", report(num_tokens=-1)),
    "evaluation": Case(REMOTE, "evaluation", evaluation),
}


def hear(link: ZmqLink, *kinds: type) -> Any:
    """The next message of one of *kinds*."""
    deadline = Deadline.after(20.0)
    while True:
        envelope = link.receive(deadline)
        if isinstance(envelope.message, kinds):
            return envelope


def enter(link: ZmqLink) -> tuple[Stamp, Plan]:
    """Join as an honest device does; returns the stamp of the first round, and the plan."""
    blank = Stamp()
    link.send(Hello(stamp=blank, protocol=PROTOCOL_VERSION, sdk_version="0", codecs=("float32",)))
    stamp = hear(link, Welcome).message.stamp
    plan = hear(link, PlanAssigned).message.plan
    link.send(Ready(stamp=stamp, vocab_size=VOCAB, num_samples=9, held_steps=()))
    return stamp, plan


def test_each_is_expelled_and_the_others_finish(cluster: Cluster) -> None:
    """NaN, wrong shapes, sizes, dtypes, numbers and times: 22 bad devices, two good ones."""
    cluster.register(*CASES)
    serving = cluster.serve(cluster.config(min_devices=2))
    serving.state.wait_for({"a", "b", *CASES})
    serving.start()
    clients = cluster.start("a", "b")
    links = {name: cluster.link(name) for name in CASES}
    plans = {name: enter(link)[1] for name, link in links.items()}
    stamps = {name: hear(link, RoundStart).message.stamp for name, link in links.items()}

    for name, case in CASES.items():
        links[name].send(*case.say(stamps[name], plans[name]))

    for name, case in CASES.items():
        failure = hear(links[name], Failure).message
        assert failure.error == case.error, f"{name}: {failure}"
        assert case.words in failure.text, f"{name}: {failure}"
        assert issubclass(getattr(errors, failure.error), EdgeError)
    assert serving.wait() == "completed"
    wait_all(clients)
    assert all(math.isfinite(row["train_loss"]) for row in serving.rows[1:])
    assert {row["samples"] for row in serving.rows[1:]} == {2 * 4 * 3}


def test_out_of_order_is_expelled(cluster: Cluster) -> None:
    """Whatever comes before Hello and Ready is refused, and the coordinator lives."""
    serving = cluster.serve(cluster.config(min_devices=2)).start()
    stamp, plan = (
        Stamp(run="run-1"),
        Plan(split=2, ranks={}, alphas={}, batch_size=4, micro_batch=4),
    )
    early = [
        activation()(stamp, plan),
        gradient(stamp, plan),
        upload(1.0)(stamp, plan),
        report()(stamp, plan),
        evaluation(stamp, plan),
        (Ready(stamp=stamp, vocab_size=VOCAB, num_samples=9, held_steps=()), {}),
    ]
    for message, tensors in early:
        with cluster.link("c") as link:
            link.send(message, tensors)
            try:
                answer = link.receive(Deadline.after(0.2)).message
            except (ReceiveTimeout, EdgeError):
                continue
            assert type(answer).__name__ in ("Failure", "Refused")

    clients = cluster.start("a", "b")

    assert serving.wait() == "completed"
    wait_all(clients)


def test_spoilt_gradients_of_kept_labels(cluster: Cluster) -> None:
    """With labels on the device, a NaN gradient or a hidden state that overflows is expelled."""
    cluster.register("spoilt", "vast")
    serving = cluster.serve(cluster.config(labels="device", min_devices=2))
    serving.state.wait_for({"a", "b", "spoilt", "vast"})
    serving.start()
    clients = cluster.start("a", "b")
    links = {name: cluster.link(name) for name in ("spoilt", "vast")}
    for link in links.values():
        enter(link)
    for name, link in links.items():
        stamp = hear(link, RoundStart).message.stamp
        value = 3.3e38 if name == "vast" else 1.0
        message, tensors = activation(hidden=hidden(4, 6, HIDDEN, value=value))(
            stamp, Plan(split=2, ranks={}, alphas={}, batch_size=4, micro_batch=4)
        )
        link.send(message, {n: t for n, t in tensors.items() if n != "labels"})
    for name, value in (("spoilt", math.nan), ("vast", 1.0)):
        stamp = hear(links[name], TopHidden).message.stamp
        grad = hidden(4, 6, HIDDEN, value=value)
        links[name].send(TopGradient(stamp=stamp, micro=0), {"grad": grad})

    failures = [hear(link, Failure, Gradient).message for link in links.values()]

    assert [failure.error for failure in failures] == [NUMERIC, NUMERIC]
    assert serving.wait() == "completed"
    wait_all(clients)
    assert sum(event["event"] == "step.skipped" for event in serving.events) <= 1


def test_factors_of_another_rank_are_refused(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device whose coordinator hands out what is not its plan's says so by name, and ends."""

    def cut(pairs: Any, residual: Any, codec: str) -> dict[str, TensorOut]:
        found = tensors_of(pairs, residual, codec)
        name = next(name for name in found if name.endswith(".A"))[:-2]
        found[f"{name}.A"] = (found[f"{name}.A"][0][1:], "float32")
        found[f"{name}.B"] = (found[f"{name}.B"][0][:, 1:], "float32")
        return found

    tensors_of = round_start._tensors
    monkeypatch.setattr(round_start, "_tensors", cut)
    cluster.serve(cluster.config(min_devices=1)).start()
    (client,) = cluster.start("a")

    with pytest.raises(RemoteProtocolError, match=r"RoundStart: tensor '.*\.A': \(3, .*: \(4, "):
        client.wait(20.0)


def test_garbage_on_the_wire(cluster: Cluster) -> None:
    """Random bytes from a registered key disturb nobody."""
    serving = cluster.serve(cluster.config(min_devices=2)).start()
    clients = cluster.start("a", "b")
    keys = load_key_pair(cluster.folder / "c.key")
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 200
        socket.curve_serverkey = cluster.public.encode()
        socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), keys.secret.encode()
        socket.connect(cluster.address)
        draw = np.random.default_rng(0)
        for size in (0, 1, 31, 32, 33, 1000, 100_000):
            socket.send(draw.bytes(size))
            socket.send_multipart([draw.bytes(size), b"", draw.bytes(9)])

    assert serving.wait() == "completed"
    wait_all(clients)
