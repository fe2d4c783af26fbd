"""A coordinator and its devices over real sockets, in threads of one process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.config.run import DeviceSettings, EvaluationConfig, ServeConfig
from coordinator.engine.interface import EngineMaker
from coordinator.engine.server_model import ServerModel
from coordinator.gateway.gateway import GatewayConfig, ZmqGateway
from coordinator.gateway.keys.allow_list import AllowList
from coordinator.results.events.event import RunEvent
from coordinator.results.events.rounds import RoundDone, StepDone
from coordinator.results.run_folder import RunFolder
from coordinator.rounds.loop import Coordinator
from edge_sdk.client.callbacks import Callback
from edge_sdk.client.client import EdgeClient
from edge_sdk.client.config import ClientConfig
from edge_sdk.data.rows import DataConfig
from edge_sdk.deadline import Deadline
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.protocol.messages import StepReport
from edge_sdk.runtime.training import TrainingConfig
from edge_sdk.transport.keys import create_key_pair, load_key_pair
from edge_sdk.transport.link import Link, LinkConfig
from edge_sdk.transport.zmq_link import ZmqLink
from tests.families import MORE, more_config, more_model
from tests.tiny import CLASSES, VOCAB, make_config, make_model, task_of

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'-\n"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
WORDS = ("red", "green", "small", "old", "boat", "house", "river", "bird", "sees", "likes", "near")
# No run of these tests takes a quarter of it on a slow machine.
PATIENCE_S = 40.0
ANY_PORT = "tcp://127.0.0.1:*"
# Where devices dial before something is served: the discard port.
NOBODY = "tcp://127.0.0.1:9"


def save_model(family: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a tiny model and a tokenizer of single characters to *folder*."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if family in MORE:
        model: Any = more_model(family, more_config(family, **changes))
    else:
        model = make_model(make_config(family, **changes), task_of(family), seed)
    model.save_pretrained(folder)
    vocab = {token: number for number, token in enumerate((*SPECIAL, *LETTERS))}
    assert len(vocab) <= VOCAB
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def sentences(seed: int, count: int = 24) -> list[dict[str, Any]]:
    """Private texts of one device."""
    draw = np.random.default_rng(seed)
    return [{"text": " ".join(draw.choice(WORDS, draw.integers(2, 6)))} for _ in range(count)]


def classified(seed: int, count: int = 24) -> list[dict[str, Any]]:
    """Texts whose class is their first word."""
    draw = np.random.default_rng(seed)
    numbers = draw.integers(0, CLASSES, count)
    return [{"text": f"{WORDS[n]} {draw.choice(WORDS)}", "label": WORDS[n]} for n in numbers]


class Trap:
    """A watcher that acts when something happens; it may raise, as a crash would."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self.on_step: Callable[[str, StepReport], None] = lambda _device, _report: None
        self.on_row: Callable[[dict[str, Any]], None] = lambda _row: None

    def see(self, event: RunEvent) -> None:
        """Keep what has a text; let the trap decide at steps and rows."""
        self.notes.extend(event.text.splitlines())
        if isinstance(event, StepDone):
            self.on_step(event.device, event.report)
        elif isinstance(event, RoundDone):
            self.rows.append(dict(event.row))
            self.on_row(dict(event.row))


class Crash(BaseException):
    """The coordinator dies here and now: no error that anybody could answer for."""


class Died(BaseException):
    """The device dies here and now, without a goodbye."""


class DieAt(Callback):
    """Lets its device die when that has finished *step*."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, report: StepReport) -> None:
        """Die at the step."""
        if report.stamp.step == self._step:
            raise Died


class Serving:
    """A coordinator in a thread of its own."""

    def __init__(self, config: ServeConfig, coordinator: Coordinator, trap: Trap) -> None:
        self.config, self.coordinator, self.trap = config, coordinator, trap
        self.model, self.gateway = coordinator.model, coordinator.gateway
        self.folder, self.ledger = coordinator.folder, coordinator.learned.ledger
        self.planner, self.admission = coordinator.planner, coordinator.admission
        self.state = coordinator.run.state
        self.outcome = ""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="coordinator", daemon=True)

    def start(self) -> Serving:
        """Begin."""
        self._thread.start()
        return self

    def _serve(self) -> None:
        try:
            self.outcome = self.coordinator.serve()
        except Crash:
            self.outcome = "crashed"
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._error = error
        finally:
            self.gateway.close()

    def wait(self, timeout_s: float = PATIENCE_S) -> str:
        """Wait for the end; returns how it came."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still serving: {self.state}; {self.trap.notes}"
        if self._error is not None:
            raise self._error
        return self.outcome

    def stop_at(self, step: int, device: str = "a") -> Serving:
        """Ask for a stop, as Ctrl-C does, when *device* has reported *step*."""

        def check(name: str, report: StepReport) -> None:
            if (name, report.stamp.step) == (device, step):
                self.coordinator.stop()

        self.trap.on_step = check
        return self

    def crash_at(self, step: int, device: str = "a") -> Serving:
        """Die without a goodbye when *device* has reported *step*."""

        def check(name: str, report: StepReport) -> None:
            if (name, report.stamp.step) == (device, step):
                raise Crash

        self.trap.on_step = check
        return self

    @property
    def metrics(self) -> bytes:
        """The bytes of metrics.jsonl."""
        return (self.folder.path / "metrics.jsonl").read_bytes()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return self.folder.rows("metrics.jsonl")

    @property
    def events(self) -> list[dict[str, Any]]:
        """The rows of events.jsonl."""
        return self.folder.rows("events.jsonl")


class Cluster:
    """Keys, allow-list and folders of one coordinator and its devices."""

    def __init__(
        self, folder: Path, model: Path, parts: Path, names: Sequence[str] = ("a", "b", "c")
    ) -> None:
        self.folder, self.model, self.parts, self.names = folder, model, parts, tuple(names)
        self.address = NOBODY
        self.public = create_key_pair(folder / "coordinator.key").public
        self.allowed = folder / "devices.yaml"
        self.register(*names)
        self._served: list[Serving] = []
        self._clients: list[EdgeClient] = []
        self._links: list[ZmqLink] = []

    def register(self, *names: str) -> None:
        """Let devices in."""
        for name in names:
            pair = create_key_pair(self.folder / f"{name}.key")
            AllowList(self.allowed).register(name, pair.public)

    # ---- coordinator ----

    def config(self, **settings: Any) -> ServeConfig:
        """A run of all devices: SGD, two rounds of three steps, float32."""
        settings = {
            "model": str(self.model),
            "secret_key": self.folder / "coordinator.key",
            "allow_list": self.allowed,
            "runs": self.folder / "runs",
            "name": "run",
            "rounds": 2,
            "steps_per_round": 3,
            "min_devices": len(self.names),
            "labels": "server",
            "waves": "gathered",
            "default": DeviceSettings(split=2, batch_size=4, codec="float32"),
            "lora": LoraConfig(r=4, lora_alpha=8),
            "training": TrainingConfig(learning_rate=1e-2),
            "evaluation": EvaluationConfig(),
            "device": "cpu",
            **settings,
        }
        return ServeConfig(**settings)

    def serve(
        self,
        config: ServeConfig | None = None,
        *,
        trap: Trap | None = None,
        make_engine: EngineMaker | None = None,
    ) -> Serving:
        """Start a coordinator; where the run's folder exists, it resumes."""
        config, trap = config or self.config(), trap or Trap()
        model = ServerModel(config, PartCache(self.parts), make_engine)
        settings = GatewayConfig(
            address=ANY_PORT if self.address == NOBODY else self.address,
            keys=load_key_pair(config.secret_key),
            silent_after_s=min(30.0, config.patience_s / 2),
            gone_after_s=config.patience_s,
        )
        gateway = ZmqGateway(settings, AllowList(config.allow_list))
        self.address = gateway.address
        assert config.name is not None
        path = config.runs / config.name
        is_new = not path.exists()
        folder = RunFolder.create(config.runs, config.name) if is_new else RunFolder(path)
        coordinator = Coordinator(config, model, folder, gateway, trap, "run-1")
        if not is_new:
            coordinator.resume(folder.load_checkpoint())
        serving = Serving(config, coordinator, trap)
        self._served.append(serving)
        return serving

    # ---- devices ----

    def client(
        self,
        name: str,
        rows: Any = None,
        callback: Callback | None = None,
        link: Link | None = None,
        **settings: Any,
    ) -> EdgeClient:
        """A device that is not started yet."""
        settings = {
            "coordinator": self.address,
            "server_key": self.public,
            "secret_key": self.folder / f"{name}.key",
            "device": "cpu",
            "cache": self.parts,
            "state": self.folder / "state",
            "patience_s": PATIENCE_S,
            **settings,
        }
        client = EdgeClient(ClientConfig(**settings), rows, callback, link)
        self._clients.append(client)
        return client

    def start(self, *names: str, **settings: Any) -> list[EdgeClient]:
        """Start devices, by default all, each with texts of its own."""
        return [
            self.client(name, sentences(ord(name)), **settings).start()
            for name in names or self.names
        ]

    def link(self, name: str) -> ZmqLink:
        """A bare connection with the key of *name*, for devices that do not behave."""
        keys = load_key_pair(self.folder / f"{name}.key")
        link = ZmqLink(LinkConfig(address=self.address, server_key=self.public, keys=keys))
        self._links.append(link)
        return link

    def close(self) -> None:
        """End what a failed test has left behind."""
        for link in self._links:
            link.close(0.0)
        for client in self._clients:
            client.stop()
        for serving in self._served:
            serving.coordinator.stop()


def wait_all(clients: Iterable[EdgeClient], timeout_s: float = PATIENCE_S) -> None:
    """Wait until every client has ended; raises what one of them ended with."""
    deadline = Deadline.after(timeout_s)
    for client in clients:
        assert client.wait(deadline.left_s()), "a client has not ended"


def products(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A ledger's *state* with `B A` in place of two factors.

    Which of them an SVD turns round depends on its input's last bits, and in total on nothing.
    """
    factors = {key[:-2] for key in state if key.endswith(".A")}
    rest = {k: v for k, v in state.items() if k[:-2] not in factors}
    return rest | {name: state[f"{name}.B"] @ state[f"{name}.A"] for name in factors}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write *rows* as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def held_out(fraction: float = 0.25) -> DataConfig:
    """Private data of which a share is for validation."""
    return DataConfig(validation_fraction=fraction)
