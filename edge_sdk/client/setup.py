"""What a device needs for its part in a run: model parts, tokenizer, data, runtime.

Nothing here trains. What is fetched is checked against its hash before it is used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdk.client.backends import RuntimeRequest, choose_backend
from edge_sdk.client.config import ClientConfig
from edge_sdk.client.offer.base_choice import (
    BaseChoice,
    decide,
    keep_choice,
    kept_choice,
)
from edge_sdk.client.profile import device_memory, device_profile
from edge_sdk.data.batches import Batches
from edge_sdk.data.rows import Row, load_data
from edge_sdk.data.tally import Tally
from edge_sdk.data.tokenize import Example, ModelLimits, tokenize_rows
from edge_sdk.errors import ModelError, RemoteProtocolError
from edge_sdk.files import atomic_write
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.kept.part_cache import PartCache
from edge_sdk.model.kept.part_hashes import PartHashes
from edge_sdk.model.kept.split_proof import prove_split
from edge_sdk.model.safetensors_files import map_part
from edge_sdk.model.weights import FILE_NAMES, ModelSource, open_part, without_leads
from edge_sdk.names import inside
from edge_sdk.protocol.fragments import Envelope
from edge_sdk.protocol.messages import PartRequest, PlanAssigned, Stamp, Welcome
from edge_sdk.protocol.plan import Part, Plan
from edge_sdk.runtime.training import TrainingConfig, from_pairs
from profiler.sensors.memory import return_freed

if TYPE_CHECKING:
    from edge_sdk.runtime.interface import Runtime
    from profiler.profile import DeviceProfile

log = logging.getLogger(__name__)

# Seconds of a download between two words about it.
TELL_EVERY_S = 2.0

Dataset = Iterable[Mapping[str, Any]] | Any
Ask = Callable[[PartRequest], Envelope]


@dataclass
class TokenizedData:
    """The device's data, ready for batches."""

    train: list[Example]
    validation: list[Example]
    vocab_size: int
    pad_id: int
    tally: Tally
    """What became of the rows that were not taken as they stood."""


@dataclass
class _ReadRows:
    """The device's rows, not yet made tokens."""

    seed: int
    """Decides which are held out."""
    train: list[Row]
    held_out: list[Row]
    tally: Tally


class RuntimeSetup:
    """Files, data and runtime of one device in one run."""

    def __init__(self, config: ClientConfig, dataset: Dataset | None) -> None:
        self._config, self._dataset = config, dataset
        self.backend = choose_backend(config)
        self._cache = PartCache(config.cache)
        self._local: ModelSource | None = None
        self._hashes: PartHashes | None = None
        self._files: Path | None = None
        self._read: _ReadRows | None = None
        self._longest = 0
        self.say: Callable[[str], None] = lambda _doing: None
        """Told what takes a while, in a few words."""
        self.folder = config.state
        """Of the run, for what is decided once in it."""

    def fetch(self, part: Part, ask: Ask, stamp: Stamp) -> Path:
        """Return the file of *part*: from the cache, or chunk by chunk from the coordinator."""
        is_continued, progress = self._cache.received(part) > 0, _Progress(part, self.say)
        while not self._cache.has(part):
            offset = self._cache.received(part)
            if offset < part.num_bytes:
                self._cache.check_room(part)
                answer = ask(PartRequest(stamp=stamp, sha256=part.sha256, offset=offset))
                data = answer.tensors["data"].data
                _check_advance(part, offset, data.nbytes)
                self._cache.append(part, offset, data)
                progress.at(offset + data.nbytes)
                continue
            log.info("part.fetched name=%s bytes=%d", part.name, part.num_bytes)
            try:
                self._cache.finish(part)
            except ModelError as error:
                if not is_continued:
                    raise
                # What an earlier download had left was damaged, not what was sent now.
                log.warning("part.damaged name=%s reason=%s", part.name, error)
                is_continued = False
        return self._cache.path(part)

    def files(self, welcome: Welcome, ask: Ask) -> Path:
        """Return a folder with the model's config and tokenizer.

        The private rows are read before that: what is wrong with them is better known before
        anything is measured, or fetched.

        Raises:
            DataError: as `data`.
        """
        self._rows(welcome)
        if not self.backend.is_loaded:
            self.say(f"importing {self.backend.needs[0]}")
            self.backend.load()
        part = welcome.files
        folder = inside(self._cache.folder, f"{part.sha256}.files")
        for name, stored in map_part(self.fetch(part, ask, welcome.stamp)).items():
            if name not in FILE_NAMES:
                raise ModelError(f"the coordinator sent a file that is no part of a model: {name}")
            data = without_leads(name, stored.array.tobytes())
            atomic_write(folder / name, data, mode=0o666, sync=False)
        self._files = folder
        return folder

    def data(self, welcome: Welcome) -> TokenizedData:
        """Read, check and tokenise the private data.

        Raises:
            DataError: something is wrong with it; the message names file and line.
        """
        assert self._files is not None, "files come first"
        read, self._read = self._rows(welcome), None
        self.say(f"tokenizing {len(read.train) + len(read.held_out):,} rows")
        tally = read.tally
        config, tokenizer = self._config.data, self.backend.tokenizer(self._files)
        limits = ModelLimits(
            vocab_size=welcome.vocab_size,
            max_positions=welcome.max_length,
            num_labels=welcome.num_labels or None,
            label_names=welcome.label_names,
        )
        train = tokenize_rows(read.train, tokenizer, config, limits, tally, isolates=True)
        validation = tokenize_rows(read.held_out, tokenizer, config, limits, tally, isolates=True)
        tally.say(self.say)
        self._longest = max(len(example.input_ids) for example in (*train, *validation))
        return TokenizedData(
            train=train,
            validation=validation,
            vocab_size=len(tokenizer),
            pad_id=welcome.pad_id,
            tally=tally,
        )

    def profile(self, welcome: Welcome, ask: Ask) -> DeviceProfile:
        """Return what this device offers the run, its choice of `base` among it."""
        files = self.files(welcome, ask)
        self.say("measuring what this device can do")
        if self._config.base == "auto":
            self._settle(welcome, None)
        return device_profile(self._config, files, welcome.max_length)

    def _settle(self, welcome: Welcome, plan: Plan | None) -> None:
        """Decide how frozen weights are kept, and say so; what an earlier start decided stays."""
        assert self._files is not None, "files come first"
        choice = kept_choice(self.folder)
        if self.backend.bases == ("float32",):
            choice = BaseChoice("float32", f"{self.backend.name} keeps no others")
        elif choice is None:
            own = device_memory(self._config)
            rank = from_pairs(LoraConfig, welcome.lora).r
            choice = decide(self._files, welcome, own, rank, plan)
            keep_choice(self.folder, choice)
        self.say(f"base: auto is {choice.base}: {choice.reason}")
        self._config = replace(self._config, base=choice.base)

    def _rows(self, welcome: Welcome) -> _ReadRows:
        """Return the private rows, read now unless they have been."""
        config, seed = self._config.data, int(welcome.training["seed"])
        if self._read is None or self._read.seed != seed:
            self.say("reading the private data")
            tally = Tally(config.bad_rows)
            self._read = _ReadRows(seed, *load_data(self._dataset, config, seed, tally), tally)
        return self._read

    def runtime(self, welcome: Welcome, assigned: PlanAssigned, ask: Ask) -> Runtime:
        """Build the device's slice with the adapters of its plan."""
        if self._config.base == "auto":
            self._settle(welcome, assigned.plan)
        settings = dict(welcome.training)
        total_steps = int(settings.pop("total_steps"))
        lora = from_pairs(LoraConfig, welcome.lora)
        training = from_pairs(TrainingConfig, settings)
        assert self._files is not None, "files come first"
        self.say(f"building {assigned.plan.split} blocks")
        if welcome.wants_ids and assigned.plan.split < welcome.num_blocks:
            what = "the coordinator's blocks need the token ids of all texts"
            self.say(f"{what}: they leave this device")
        request = RuntimeRequest(
            settings=self._config,
            files=self._files,
            welcome=welcome,
            plan=assigned.plan,
            parts=assigned.parts,
            lora=lora,
            training=training,
            total_steps=total_steps,
            fetch=lambda part: self.fetch(part, ask, welcome.stamp),
            longest=self._longest,
            tensors=lambda part: self.tensors(part, welcome, ask),
        )
        return self.backend.make(request)

    def return_freed(self) -> None:
        """Return to the system what a slice took that is let go of."""
        return_freed()

    def tensors(self, part: Part, welcome: Welcome, ask: Ask) -> Mapping[str, Any]:
        """Return the tensors of *part*, from the local model where one is named.

        Raises:
            ModelError: the local model is not the coordinator's, or this device's libraries compute
            something else when it is cut.
        """
        is_streamed = self._config.base in ("int8", "int4")
        if self._config.model is None:
            return open_part(self.fetch(part, ask, welcome.stamp), is_streamed=is_streamed)
        if self._local is None or self._hashes is None:
            task: Any = welcome.task
            self._local = ModelSource(
                self._config.model,
                task,
                num_labels=welcome.num_labels,
                is_streamed=is_streamed,
            )
            prove_split(self._local.config, task, self._cache.folder)
            self._local.load_whole(int(welcome.training["seed"]))
            self._hashes = PartHashes(self._local, self._cache.folder)
        sha256 = self._hashes.describe(part.name).sha256
        if sha256 != part.sha256:
            raise ModelError(
                f"model {self._config.model!r} is not the coordinator's: part {part.name!r} has "
                f"sha256 {sha256[:12]}..., expected {part.sha256[:12]}...; leave `model` out to "
                "download the parts"
            )
        return self._local.tensors(part.name)


class _Progress:
    """Says how far a download is, where that takes long."""

    def __init__(self, part: Part, say: Callable[[str], None]) -> None:
        self._part, self._say, self._told_s = part, say, time.monotonic()

    def at(self, num_bytes: int) -> None:
        """Say that so many bytes are here, if nothing was said for a while."""
        now_s = time.monotonic()
        if now_s - self._told_s >= TELL_EVERY_S:
            self._told_s = now_s
            here, all_mb = num_bytes / 1e6, self._part.num_bytes / 1e6
            self._say(f"fetching {self._part.name}: {here:.1f} of {all_mb:.1f} MB")


def _check_advance(part: Part, offset: int, num_bytes: int) -> None:
    """Refuse an answer after which a download would stand where it stood, or beyond its end."""
    if not 0 < num_bytes <= part.num_bytes - offset:
        raise RemoteProtocolError(
            f"part {part.name!r}: {num_bytes} bytes came at {offset}, of {part.num_bytes} in all"
        )


def make_batches(prepared: TokenizedData, assigned: PlanAssigned, seed: int, name: str) -> Batches:
    """Return the device's stream of batches; a pure function of seed, name and step."""
    plan = assigned.plan
    return Batches(
        prepared.train, plan.batch_size, plan.micro_batch, seed, name, pad_id=prepared.pad_id
    )


def as_int32(array: np.ndarray) -> np.ndarray:
    """Return labels or lengths as they travel."""
    return np.ascontiguousarray(array, dtype=np.int32)
