"""Where a model's weights come from, and the parts in which they travel.

A part is a safetensors file known by its SHA-256: `files` (config, tokenizer), `front`,
`block.<i>`, `tail`. Knows folders and the Hugging Face cache; knows nothing of networks or of
running a model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edge_sdk.errors import ModelError, StorageError, one_line
from edge_sdk.files import atomic_write, storage_errors
from edge_sdk.model.safetensors_files import Some, open_files
from edge_sdk.protocol.plan import Part

if TYPE_CHECKING:
    import torch

    from edge_sdk.model.layout import Layout, Task

log = logging.getLogger(__name__)

# What a device needs besides weights: never code, never anything that could be executed.
FILE_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def locate(model: str, revision: str | None = None) -> Path:
    """Return the folder of *model*: a local folder, or a Hugging Face id from cache or hub.

    `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` are respected.

    Raises:
        ModelError: neither a folder with a config.json nor an id that can be had.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model folder {model!r} has no config.json")
        return folder
    if folder.is_absolute() or model.startswith((".", "~")):
        raise ModelError(f"model folder {model!r} does not exist")
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.safetensors.index.json", *FILE_NAMES]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
    except Exception as error:  # noqa: BLE001 - the hub client raises a wide family of errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model {model!r} is neither a local folder nor available from the hub: {reason}"
        ) from error


def hub_origin(folder: Path) -> tuple[str, str] | tuple[None, None]:
    """Return hub id and commit of a snapshot in a hub cache; two times None for other folders."""
    names = folder.absolute().parts[-3:]
    if len(names) < 3 or names[1] != "snapshots" or not names[0].startswith("models--"):
        return None, None
    return "/".join(names[0].split("--")[1:]), names[2]


class ModelSource:
    """A model on local disk, opened for reading part by part; tensors stay memory-mapped."""

    def __init__(
        self,
        model: str,
        task: Task,
        *,
        num_labels: int = 0,
        revision: str | None = None,
        is_streamed: bool = False,
    ) -> None:
        """Open *model*; *is_streamed*: see `open_files`."""
        from edge_sdk.model.layout import find_layout

        self.folder = locate(model, revision)
        self.hub_id: str | None
        self.revision: str | None
        self.hub_id, self.revision = hub_origin(self.folder)
        """Where others find the model: its hub id and commit; None for a folder of one's own."""
        self.task = task
        self.config = load_config(self.folder, num_labels)
        self.layout: Layout = find_layout(self.config, task)
        self._state = _open_tensors(self.folder, is_streamed)
        self._renamed = not self._has_all()

    def _has_all(self) -> bool:
        return all(
            name in self._state for p in self.layout.part_names() for name in self.layout.part(p)
        )

    def load_whole(self, seed: int) -> None:
        """Let transformers read the checkpoint when its names are not the model's own.

        Old spellings, a missing head (initialised from *seed*) and other formats need this; it
        holds the whole model in memory.
        """
        if not self._renamed:
            return
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        factory: Any = AutoModelForCausalLM
        if self.task == "sequence-classification":
            factory = AutoModelForSequenceClassification
        torch.manual_seed(seed)
        try:
            model = factory.from_pretrained(self.folder, config=self.config, dtype="auto")
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"model {self.folder} cannot be read: {error}") from error
        self._state = _InMemory(model.state_dict())
        self._renamed = False

    def tensors(self, part: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors of *part* by whole-model name, each read when it is asked for.

        Raises:
            ModelError: the folder does not hold them under these names.
        """
        names = self.layout.part(part)
        missing = [name for name in names if name not in self._state]
        if missing:
            raise ModelError(f"{self.folder}: no tensor {missing[0]!r} (part {part!r})")
        return Some(self._state, names)

    def pack(self, part: str) -> bytes:
        """Return *part* as the bytes of a safetensors file, the same on every machine."""
        import torch
        from safetensors.torch import save

        if part != "files":
            return save({name: t.contiguous() for name, t in self.tensors(part).items()})
        files = {name: (self.folder / name) for name in FILE_NAMES}
        contents = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
        contents["config.json"] = self.config.to_json_string().encode()
        return save(
            {
                name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
                for name, data in contents.items()
                if data
            }
        )

    def describe(self, part: str) -> Part:
        """Return name, hash and size of *part*."""
        data = self.pack(part)
        return Part(name=part, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))

    def part_names(self) -> tuple[str, ...]:
        """Return the names of all parts."""
        return ("files", *self.layout.part_names())


def load_config(folder: Path, num_labels: int) -> Any:  # noqa: ANN401 - a transformers config
    """Read config.json; a classifier gets *num_labels* and, if it has none, a padding token."""
    from transformers import AutoConfig

    from edge_sdk.model.layout import without_cache

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder / 'config.json'} cannot be read: {reason}") from error
    without_cache(config)
    text_config = config.get_text_config()
    vocab_size = getattr(text_config, "vocab_size", 0)
    if not _is_token(getattr(text_config, "pad_token_id", None), vocab_size):
        text_config.pad_token_id = None  # some say -1, or a token that was never given a row
    if num_labels:
        config.num_labels = num_labels
        if text_config.pad_token_id is None:
            text_config.pad_token_id = _padding_token(folder, text_config, vocab_size)
            config.pad_token_id = text_config.pad_token_id
    return config


def _padding_token(folder: Path, config: Any, vocab_size: int) -> int:
    """Return what fills up a batch for a classifier: the tokenizer's choice, or an end of text.

    Decoders pool by it, so that whoever calls the result has to pad with the same.
    """
    own: int | None = None
    with suppress(ModelError):  # none lies there, or none that can be read: others will say so
        own = load_tokenizer(folder).pad_token_id
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    found: int = next(token for token in (own, *ends, 0) if _is_token(token, vocab_size))
    return found


def _is_token(token: object, vocab_size: int) -> bool:
    return isinstance(token, int) and 0 <= token < vocab_size


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401 - a transformers tokenizer
    """Read the tokenizer that lies in *folder*.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - tokenizers raise plain Exception, and others more
        raise ModelError(f"{folder}: no tokenizer that can be read: {one_line(error)}") from error


def model_hash(parts: Mapping[str, Part]) -> str:
    """Return one hash for a whole model: that of its parts' hashes, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {parts[name].sha256}\n".encode())
    return digest.hexdigest()


class _InMemory(dict[str, "torch.Tensor"]):
    """Tensors of a loaded model."""


def open_part(path: Path, *, is_streamed: bool = False) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a part file, memory-mapped; *is_streamed*: see `open_files`."""
    return open_files([path], is_streamed)


def _open_tensors(folder: Path, is_streamed: bool) -> Mapping[str, torch.Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of safetensors files: {error!r}") from error
        return open_files([folder / name for name in names], is_streamed)
    single = folder / "model.safetensors"
    return open_files([single], is_streamed) if single.is_file() else _InMemory()


class PartCache:
    """Parts on disk under their hashes; partial downloads are kept and continued."""

    def __init__(self, folder: Path | None = None) -> None:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self.folder = folder or Path(root) / "edgesplit" / "parts"
        self._checked: dict[str, tuple[int, int, int]] = {}
        """Inode, size and time of change of files whose hash this process has seen to be right."""

    def path(self, part: Part) -> Path:
        """Return where *part* lies once it is complete."""
        return self.folder / f"{part.sha256}.safetensors"

    def has(self, part: Part) -> bool:
        """Return whether *part* is complete and whole.

        The hash of a file is computed once in a process, and again when the file has changed. One
        that is damaged is thrown away: its content can be had again.
        """
        path = self.path(part)
        try:
            now = _identity(path)
            if self._checked.get(part.sha256) == now:
                return True
            with path.open("rb") as file:
                found = _digest(file) if now[1] == part.num_bytes else ""
            if found == part.sha256:
                self._checked[part.sha256] = now
                return True
            log.warning("part.damaged name=%s file=%s; it is fetched again", part.name, path)
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}") from error
        return False

    def received(self, part: Part) -> int:
        """Return the bytes of *part* that an interrupted download has left."""
        try:
            return self._partial(part).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return 0  # not begun, or another device of this machine has finished it

    def append(self, part: Part, offset: int, data: memoryview | bytes) -> None:
        """Add a stretch of *part*; what is there already is written again with the same bytes.

        Several devices of one machine may fetch the same part into the same folder at once: a
        stretch that would leave a hole, as another of them has just finished the file, is dropped.
        """
        with storage_errors(f"part {part.name!r} to {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            how = os.O_WRONLY | (0 if offset else os.O_CREAT)
            try:
                handle = os.open(self._partial(part), how, 0o644)
            except FileNotFoundError:
                return
            with open(handle, "wb") as file:
                if offset <= os.fstat(handle).st_size:
                    file.seek(offset)
                    file.write(data)

    def finish(self, part: Part) -> Path:
        """Check the hash of a complete download and move it into place.

        Where another device of this machine has done so, and has begun anew, it is dropped.

        Raises:
            ModelError: the bytes are not those of the part; they are thrown away.
        """
        partial, path = self._partial(part), self.path(part)
        own = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            with partial.open("rb") as file:
                checked, found = os.fstat(file.fileno()), _digest(file)
            # Another device may put another file in its place meanwhile, but not in that of `own`.
            partial.replace(own)
            is_others = checked.st_size < part.num_bytes or own.stat().st_ino != checked.st_ino
            if is_others or found != part.sha256:
                own.unlink()
            else:
                own.replace(path)
                self._checked[part.sha256] = _identity(path)
            if is_others or found == part.sha256:
                return path
        except FileNotFoundError:  # another device of this machine was faster
            return path
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        raise ModelError(
            f"part {part.name!r} arrived damaged: sha256 {found[:12]}..., "
            f"expected {part.sha256[:12]}...; start again to fetch it again"
        )

    def store(self, part: Part, data: bytes) -> Path:
        """Put a whole part into the cache."""
        atomic_write(self.path(part), data, sync=False)  # its hash tells whether it is whole
        self._checked[part.sha256] = _identity(self.path(part))
        return self.path(part)

    def _partial(self, part: Part) -> Path:
        return self.folder / f"{part.sha256}.partial"


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
