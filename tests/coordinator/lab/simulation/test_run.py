"""A simulated run: what a deployment computes, the same every time, with a modelled clock."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.commands.simulate import load_simulation
from coordinator.config.planning import PlanningConfig
from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from coordinator.export.run import export_run
from coordinator.lab.simulation import device as simulated_device
from coordinator.lab.simulation import run as simulation
from coordinator.lab.simulation.boards import Board, Connection, Scale
from coordinator.lab.simulation.clock import Costs
from coordinator.lab.simulation.config import FleetConfig, SimulatedDeviceConfig, SimulationConfig
from coordinator.lab.simulation.device import InstrumentedRuntime, SharedCompute
from coordinator.lab.simulation.result import SimulationResult
from coordinator.lab.simulation.run import simulate
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import StepDone
from coordinator.results.run_folder import CONFIG
from coordinator.results.watchers import Watchers
from edge_sdk.config.loader import load_config
from edge_sdk.data.rows import DataConfig
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.layout import find_layout
from edge_sdk.model.shape import model_shape
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.training import TrainingConfig
from profiler.estimate.flops import FlopsEstimate
from tests.e2e.cluster import (
    Cluster,
    classified,
    save_model,
    sentences,
    wait_all,
    write_rows,
)
from tests.tiny import BLOCKS

# peft's own, while the exported adapter is read back.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk."""
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of parts for all runs of this file."""
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, llama: Path, parts: Path) -> Any:
    """Make configs of small simulations of three devices, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("simulations")
    train = write_rows(folder / "train.jsonl", sentences(1, 30))
    dev = write_rows(folder / "dev.jsonl", sentences(2, 6))
    devices = {
        "n": SimulatedDeviceConfig(count=2),
        "x": SimulatedDeviceConfig(board="jetson-nano", link="5g"),
    }
    numbers = count()

    def config(**settings: Any) -> SimulationConfig:
        fleet = {
            "devices": devices,
            "data": DataConfig(path=str(train)),
            "cache": parts,
            **settings.pop("fleet", {}),
        }
        settings = {
            "model": str(llama),
            "runs": folder,
            "name": f"run-{'x' * next(numbers)}",
            "rounds": 2,
            "steps_per_round": 2,
            "waves": "gathered",
            "default": DeviceSettings(split=2, batch_size=4, micro_batch=2, codec="float32"),
            "lora": LoraConfig(r=4, lora_alpha=8),
            "training": TrainingConfig(learning_rate=1e-2),
            "evaluation": EvaluationConfig(data=DataConfig(path=str(dev))),
            "device": "cpu",
            **settings,
        }
        return SimulationConfig(**settings, simulation=FleetConfig(**fleet))

    return config


@pytest.fixture(scope="module")
def plain(make: Any) -> SimulationResult:
    """A simulation of which several tests look at something else."""
    return simulate(make(), Watchers())


def file_of(result: SimulationResult, name: str) -> bytes:
    """A file of the run folder."""
    return (result.folder.path / name).read_bytes()


@pytest.mark.parametrize("labels", ["server", "device"])
def test_a_simulation_learns_what_a_deployment_learns(
    tmp_path: Path, llama: Path, parts: Path, labels: Any
) -> None:
    """The same devices with the same rows over real sockets give the same bytes of metrics."""
    files = {name: write_rows(tmp_path / f"{name}.jsonl", sentences(ord(name))) for name in "abc"}
    cluster = Cluster(tmp_path, llama, parts)
    settings = {"labels": labels, "steps_per_round": 1, "devices": {"b": DeviceSettings(split=3)}}
    deployed = cluster.config(**settings)
    serving = cluster.serve(deployed).start()
    clients = [
        cluster.client(name, data=DataConfig(path=str(path))).start()
        for name, path in files.items()
    ]
    assert serving.wait() == "completed"
    wait_all(clients)

    values = {name: getattr(deployed, name) for name in ServeConfig.__dataclass_fields__}
    devices = {name: SimulatedDeviceConfig(data=str(path)) for name, path in files.items()}
    fleet = FleetConfig(devices=devices, cache=parts)
    result = simulate(
        SimulationConfig(**values | {"name": "simulated"}, simulation=fleet), Watchers()
    )

    assert file_of(result, "metrics.jsonl") == serving.metrics


def test_equal_simulations_are_equal(make: Any, plain: SimulationResult) -> None:
    """With dropout on both sides: the same metrics, the same times, whatever the folder's name."""
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.3)
    devices = {"x": DeviceSettings(split="all")}

    first, second = (
        simulate(make(lora=lora, devices=devices, steps_per_round=1), Watchers()) for _ in range(2)
    )

    assert file_of(first, "metrics.jsonl") == file_of(second, "metrics.jsonl")
    assert file_of(first, "clock.jsonl") == file_of(second, "clock.jsonl")
    assert first.rounds[-1].loss != plain.rounds[-1].loss


def test_numbers_are_told_and_change_nothing(make: Any, plain: SimulationResult) -> None:
    """With `report_to` the same bytes of metrics; the table has each step of each device once."""
    told = simulate(make(report_to=("csv",)), Watchers())

    assert file_of(told, "metrics.jsonl") == file_of(plain, "metrics.jsonl")
    table = file_of(told, "trackers/numbers.csv").decode().splitlines()
    losses = [line.split(",") for line in table if ",train/loss," in line]
    assert sorted((device, int(step)) for step, _, device, _, _ in losses) == [
        *((("", step)) for step in (2, 4)),
        *((device, step) for device in ("n-0", "n-1", "x") for step in (1, 2, 3, 4)),
    ]


@pytest.mark.parametrize("labels", ["server", "device"])
def test_waves_of_what_is_there_are_modelled(make: Any, labels: str) -> None:
    """They take no longer than gathered ones, teach the same, and are the same each time."""
    devices = {"n-0": DeviceSettings(split=1, in_flight=4), "n-1": DeviceSettings(split=3)}
    settings = {"labels": labels, "devices": devices, "fleet": {"jitter": 0.3}}

    gathered = simulate(make(**settings), Watchers())
    first, second = (simulate(make(waves="available", **settings), Watchers()) for _ in range(2))

    assert file_of(first, "metrics.jsonl") == file_of(second, "metrics.jsonl")
    assert file_of(first, "clock.jsonl") == file_of(second, "clock.jsonl")
    for mine, theirs in zip(first.rounds, gathered.rounds, strict=True):
        assert mine.samples == theirs.samples
        assert mine.loss == pytest.approx(theirs.loss, abs=1e-5)
        assert (mine.seconds or 0.0) <= (theirs.seconds or 0.0) * 1.001


def test_the_run_folder_is_that_of_a_served_run(plain: SimulationResult, tmp_path: Path) -> None:
    """Status, export and whoever reads a run folder need not know that it was simulated."""
    path = plain.folder.path
    config = load_config(ServeConfig, path / CONFIG, env={})
    names = {entry.name for entry in path.iterdir()}

    assert (config.min_devices, config.rounds) == (3, 2)
    assert export_run(plain.folder, tmp_path / "adapter", merged=False) < 1e-4
    assert {"adapter", "env.json", "events.jsonl", "telemetry.jsonl", "clock.jsonl"} <= names
    assert "checkpoint-000004" in names


def test_all_kinds_of_traffic_are_the_bytes_of_the_clock(
    make: Any, plain: SimulationResult
) -> None:
    """Nothing is counted twice or left out; labels on devices send two kinds more each way."""
    last = plain.rounds[-1]

    assert sum(last.traffic["up"].values()) == last.bytes_up
    assert sum(last.traffic["down"].values()) == last.bytes_down
    assert set(last.traffic["up"]) == {"activations", "gradients", "adapters", "other"}
    assert set(last.traffic["down"]) == {"activations", "gradients", "round starts"}
    served = simulate(make(labels="server", rounds=1, steps_per_round=1), Watchers()).rounds[-1]
    assert set(served.traffic["up"]) == {"activations", "adapters", "other"}
    assert set(served.traffic["down"]) == {"gradients", "round starts"}
    assert sum(served.traffic["up"].values()) == served.bytes_up


def test_a_straggler_costs_time_and_nothing_else(make: Any, plain: SimulationResult) -> None:
    """No plan knows of it: the same bytes of metrics, and a device that takes so much longer."""
    devices = {
        "n": SimulatedDeviceConfig(count=2),
        "x": SimulatedDeviceConfig(board="jetson-nano", link="5g", slowdown=4),
    }

    late = simulate(make(fleet={"devices": devices}), Watchers())

    assert file_of(late, "metrics.jsonl") == file_of(plain, "metrics.jsonl")
    ours, theirs = (r.rounds[-1].clock["devices"] for r in (late, plain))
    assert ours["x"]["compute_s"] == pytest.approx(4 * theirs["x"]["compute_s"])
    assert ours["x"]["up_s"] == pytest.approx(4 * theirs["x"]["up_s"])
    assert ours["n-0"]["compute_s"] == theirs["n-0"]["compute_s"]
    assert late.rounds[-1].seconds > plain.rounds[-1].seconds


def test_a_device_may_leave_for_good(make: Any, plain: SimulationResult) -> None:
    """The others go on without it, from the step on after which it was to go."""
    devices = {
        "n": SimulatedDeviceConfig(count=2),
        "x": SimulatedDeviceConfig(board="jetson-nano", link="5g", leaves_after_step=1),
    }

    left = simulate(make(fleet={"devices": devices}), Watchers())

    assert left.outcome == "completed"
    assert [r.samples for r in left.rounds] == [0, 16, 32]
    assert "x" not in left.rounds[-1].metrics.get("train_loss_by_device", {})
    assert left.rounds[-1].clock["devices"]["x"]["compute_s"] == 0
    assert left.rounds[-1].loss != plain.rounds[-1].loss
    with pytest.raises(ValueError, match="at least 1 must stay"):
        FleetConfig(devices={"a": SimulatedDeviceConfig(leaves_after_step=1)})


def test_rows_tell_what_a_comparison_needs(plain: SimulationResult) -> None:
    """Samples, loss, time and traffic add up over the rounds."""
    first, second, last = plain.rounds

    assert plain.outcome == "completed"
    assert [r.samples for r in plain.rounds] == [0, 24, 48]
    assert (first.seconds, first.bytes_up, first.plans) == (0.0, 0, {})
    assert 0 < second.seconds < last.seconds
    assert last.loss is not None
    assert first.loss is not None
    assert last.loss == last.metrics["eval"]["loss"] < first.loss
    assert last.perplexity == pytest.approx(last.metrics["eval"]["perplexity"])
    assert {name: plan.split for name, plan in last.plans.items()} == {"n-0": 2, "n-1": 2, "x": 2}
    devices = last.clock["devices"]
    assert sum(d["bytes_up"] for d in devices.values()) + second.bytes_up == last.bytes_up
    assert devices["x"]["energy_j"] == pytest.approx(devices["x"]["compute_s"] * 10)
    assert all(0 < d["busy"] < 1 for d in devices.values())


def worked(
    make: Any, llama: Path, folder: Path, labels: str, in_flight: int
) -> tuple[float, list[FlopsEstimate]]:
    """A round of one device over links that cost nothing: its seconds, and a micro-batch's work.

    The work is that of the device's blocks, of the coordinator's and of the tail, at 0.5e6
    operations a second; there are 2 steps of 2 micro-batches.
    """

    class Lengths:
        tokens: list[int] = []

        def see(self, event: RunEvent) -> None:
            if isinstance(event, StepDone):
                assert event.report.num_tokens % event.report.num_sequences == 0
                self.tokens.append(event.report.num_tokens // event.report.num_sequences)

    board = Board(memory_gib=1, tflops=1e-6, watts=1)
    fleet = {
        "devices": {"a": SimulatedDeviceConfig(board="slow", link="free")},
        "boards": {"slow": board},
        "links": {"free": Connection(down_mbit=1e12, up_mbit=1e12, rtt_ms=0)},
        "coordinator": "slow",
        "utilisation": 0.5,
    }
    rows = write_rows(folder / "equal.jsonl", [{"text": "all of one length"}] * 8)
    fleet["data"] = DataConfig(path=str(rows))
    watcher = Lengths()
    devices = {"a": DeviceSettings(in_flight=in_flight)}

    result = simulate(make(labels=labels, rounds=1, fleet=fleet, devices=devices), watcher)

    source = ModelSource(str(llama), "causal-lm")
    layout = find_layout(source.config, "causal-lm")
    costs = Costs(model_shape(source.config, "causal-lm", layout), BLOCKS)
    ranks = result.rounds[1].plans["a"].ranks
    upper = {name.replace("layers.0", f"layers.{i}"): 4 for i in (2, 3, 4) for name in ranks}
    micro = (2, watcher.tokens[0])
    work = [
        costs.flops(0, 2, ranks, *micro, front=True),
        costs.flops(2, BLOCKS, upper, *micro),
        costs.flops(BLOCKS, BLOCKS, {}, *micro, tail=True),
    ]
    seconds = result.rounds[1].seconds
    assert seconds is not None
    return seconds, work


@pytest.mark.parametrize("labels", ["server", "device"])
def test_modelled_time_is_that_of_the_work(
    make: Any, llama: Path, tmp_path: Path, labels: Any
) -> None:
    """With one micro-batch at a time a round lasts as long as all operations after each other."""
    seconds, work = worked(make, llama, tmp_path, labels, 1)

    assert seconds == pytest.approx(2 * 2 * sum(w.total for w in work) / 0.5e6, rel=1e-6)


def test_two_micro_batches_under_way_overlap(make: Any, llama: Path, tmp_path: Path) -> None:
    """The device computes the second micro-batch while the coordinator has the first."""
    seconds, (own, upper, tail) = worked(make, llama, tmp_path, "server", 2)

    serve_config = upper.total + tail.total
    first_answer = max(2 * own.forward, own.forward + serve_config)
    step = first_answer + max(own.backward, serve_config) + own.backward
    assert seconds == pytest.approx(2 * step / 0.5e6, rel=1e-6)


@pytest.mark.parametrize(("aggregation", "split"), [("stack", 4), ("svd", 4), ("zeropad", "all")])
def test_every_aggregation_can_be_simulated(make: Any, aggregation: Any, split: Any) -> None:
    """Also with labels on the coordinator and devices that are cut at different blocks."""
    default = DeviceSettings(split=split, batch_size=4, micro_batch=2)
    devices = {"x": DeviceSettings(split=2 if split == 4 else "all")}

    result = simulate(
        make(aggregation=aggregation, labels="server", default=default, devices=devices, rounds=1),
        Watchers(),
    )

    before, after = (r.loss for r in result.rounds)
    assert before is not None
    assert after is not None
    assert after < before
    is_local = split == "all"
    assert (result.rounds[-1].clock["coordinator"]["compute_s"] == 0) == is_local
    assert all(d["compute_s"] > 0 for d in result.rounds[-1].clock["devices"].values())


def test_a_classifier_can_be_simulated(make: Any, tmp_path: Path) -> None:
    """Labels, a trained head and accuracy on private validation data.

    Devices that list the classes in another order than the run learn what the others do.
    """
    model = save_model("bert", tmp_path / "bert")
    rows = write_rows(tmp_path / "labelled.jsonl", classified(3, 40))
    names = ("red", "green", "small", "old")
    found = []
    for listed in (names, names[::-1]):
        data = DataConfig(path=str(rows), labels=listed, validation_fraction=0.25)
        result = simulate(
            make(
                model=str(model),
                task="sequence-classification",
                label_names=names,
                evaluation=EvaluationConfig(),
                fleet={"data": data, "shards": "dirichlet", "alpha": 100.0},
                rounds=1,
                runs=tmp_path / str(len(found)),
            ),
            Watchers(),
        )
        found.append(result.rounds[-1])

    last = found[0]
    assert (found[1].loss, found[1].accuracy) == (last.loss, last.accuracy)
    assert last.loss is not None
    assert last.accuracy is not None
    assert set(last.metrics["eval_by_device"]) == {"n-0", "n-1", "x"}


def test_frozen_weights_are_held_once_and_never_written(
    make: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With residuals beside the weights all devices of a process share the storage of the base."""
    shared: list[SharedCompute] = []
    runtimes: list[Any] = []

    class Seen(SharedCompute):
        def __enter__(self) -> SharedCompute:
            shared.append(self)
            return super().__enter__()

    class SeenRuntime(InstrumentedRuntime):
        def __init__(self, runtime: Any, *rest: Any) -> None:
            runtimes.append(runtime)
            super().__init__(runtime, *rest)

    monkeypatch.setattr(simulation, "SharedCompute", Seen)
    monkeypatch.setattr(simulated_device, "InstrumentedRuntime", SeenRuntime)
    simulate(make(rounds=1, residual="low-rank"), Watchers())

    source = ModelSource(str(llama), "causal-lm")
    kept = {name: value for part in shared[0].parts.values() for name, value in part.items()}
    names = {name for part in ("front", "block.0", "block.1") for name in source.layout.part(part)}
    assert names <= kept.keys()
    for part in source.layout.part_names():
        for name, value in source.tensors(part).items():
            assert name not in kept or torch.equal(kept[name], value)
    assert len(runtimes) == 3
    for runtime in runtimes:
        held = {p.data_ptr() for p in runtime.slice.model.parameters() if not p.is_meta}
        assert {kept[name].data_ptr() for name in names} <= held


def test_a_scaled_simulation_trains_the_same_and_takes_longer(
    make: Any, plain: SimulationResult
) -> None:
    """Factors change times and what planning sees, never what is computed."""
    scaled = simulate(make(fleet={"scale": Scale(flops=1e4, bytes=50)}), Watchers())

    assert file_of(plain, "metrics.jsonl") == file_of(scaled, "metrics.jsonl")
    before, after = (r.rounds[-1].clock["devices"]["x"] for r in (plain, scaled))
    assert after["compute_s"] == pytest.approx(1e4 * before["compute_s"])
    assert after["up_s"] == pytest.approx(50 * before["up_s"])


def test_a_device_that_fails_ends_the_simulation(make: Any, tmp_path: Path) -> None:
    """The error is the device's own and names it; nothing is left of a run that never began."""
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "one"}, {"text": " "}])
    config = make(
        fleet={"devices": {"a": SimulatedDeviceConfig(), "b": SimulatedDeviceConfig(data=str(bad))}}
    )

    with pytest.raises(DataError, match=r"device 'b': .*bad\.jsonl:2: text is empty"):
        simulate(config, Watchers())


def test_a_simulation_needs_devices(make: Any) -> None:
    """A config without devices, or one that is trained by the coordinator, is refused."""
    with pytest.raises(ValueError, match=r"simulation\.devices must name at least 1 device"):
        make(fleet={"devices": {}})
    with pytest.raises(ConfigError, match="trained_by"):
        simulate(replace(make(), trained_by="coordinator"), Watchers())


def test_a_file_and_overrides_make_a_simulation(tmp_path: Path) -> None:
    """One file holds the run and its devices; a preset lies below both."""
    path = tmp_path / "sim.yaml"
    path.write_text(
        json.dumps({"model": "m", "simulation": {"devices": {"a": {"board": "orin-nx-8gb"}}}})
    )

    config = load_simulation(path, ["simulation.devices.a.link=3g", "rounds=3"], preset="hlora")

    assert config.simulation.devices == {"a": SimulatedDeviceConfig(board="orin-nx-8gb", link="3g")}
    assert (config.rounds, config.aggregation, config.default.split) == (3, "svd", "all")
    with pytest.raises(ConfigError, match="aggregation must be 'svd'"):
        load_simulation(path, ["aggregation=exact"], preset="hlora")


def test_planning_sees_the_boards(make: Any) -> None:
    """A slow board gets fewer blocks than a fast one, and the plans are those of every round."""
    fleet = {
        "devices": {
            "fast": SimulatedDeviceConfig(link="lan-1g", flops_per_s=1e12, memory_bytes=8e9),
            "slow": SimulatedDeviceConfig(link="lan-1g", flops_per_s=1e8, memory_bytes=8e9),
        }
    }
    planning = PlanningConfig(
        split="armsc", ranks="rngwp", rank_set=(2, 4), server_flops_per_s=1e10
    )

    result = simulate(
        make(fleet=fleet, planning=planning, default=DeviceSettings(batch_size=4)), Watchers()
    )

    assert result.outcome == "completed"
    for round_ in result.rounds[1:]:
        fast, slow = round_.plans["fast"], round_.plans["slow"]
        assert 1 <= slow.split < fast.split <= BLOCKS
        assert {*fast.ranks.values(), *slow.ranks.values()} <= {0, 2, 4}
        assert round_.clock["devices"]["slow"]["split"] == slow.split
