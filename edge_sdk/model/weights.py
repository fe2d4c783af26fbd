"""Where a model's weights come from, and the parts in which they travel.

A part is a safetensors file known by its SHA-256: `files` (config, tokenizer), `front`,
`block.<i>`, `tail`. Knows folders and the Hugging Face cache; knows nothing of networks or of
running a model.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.errors import ModelError, one_line
from edge_sdk.model.kept.findings import Looks, looks_of
from edge_sdk.model.safetensors_files import Sink, Some, open_files, write_tensors
from edge_sdk.model.torch_files import open_torch_files
from edge_sdk.protocol.plan import Part, hash_of_parts

if TYPE_CHECKING:
    import torch

    from edge_sdk.model.checkpoint import ModelTensors
    from edge_sdk.model.layout import Layout, Task

log = logging.getLogger(__name__)

# What a device needs besides weights: never code, never anything that could be executed.
FILE_NAMES = (
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
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
# What in a model's JSON files names other files, or code: a class in a repository, a kernel that is
# fetched and run. Nothing of it is needed where the files lie beside each other.
LEADS_ELSEWHERE = re.compile(
    r"auto_map|custom_(?:pipelines|generate)|trust_remote_code|\w+_(?:file|files|path|repo)"
    r"|_?(?:attn|experts)_implementation\w*|use_kernels|kernel_config"
)
# Texts on which tokenizers differ if they do: blanks, line ends, signs, other scripts.
PROBES = (
    "The boat leaves at noon.",
    "  two  blanks \n\n\n and\tlines\n",
    '### user:\nI\'ve 12345 of (them); {"a": 1}',
    "caf\u00e9 e\u0301 \u4f60\u597d \u2603 \U0001f600",
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
    older = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
    try:
        found = Path(snapshot_download(model, revision=revision, allow_patterns=wanted))
        if not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(model, revision=revision, allow_patterns=older))
        return found
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
        from edge_sdk.model.checkpoint import quantization_of, take_quantizer
        from edge_sdk.model.layout import find_layout

        self.folder = locate(model, revision)
        self.looks = self.looks_now()
        """What its files looked like before any of them was opened."""
        self.hub_id: str | None
        self.revision: str | None
        self.hub_id, self.revision = hub_origin(self.folder)
        """Where others find the model: its hub id and commit; None for a folder of one's own."""
        self.task = task
        self.config = load_config(self.folder, num_labels)
        self.quantization = quantization_of(self.config)
        """What the checkpoint says of its quantised weights; `config` no longer does."""
        quantizer = take_quantizer(self.config, self.folder)
        stored = _open_tensors(self.folder, is_streamed)
        self._dtype = _dtype(self.config, stored)
        self._checkpoint = self._under_own_names(stored, quantizer)
        if self._checkpoint.differs_where_tied():
            # Two values for one tensor: the checkpoint is right, as transformers sees it.
            for config in (self.config, self.config.get_text_config()):
                config.tie_word_embeddings = False
            self._checkpoint = self._under_own_names(stored, quantizer)
        self.layout: Layout = find_layout(self.config, task)
        self.drawn: tuple[str, ...] = ()
        """Tensors that `load_whole` has drawn, because the checkpoint lacks them."""

    def _under_own_names(self, stored: Mapping[str, torch.Tensor], quantizer: Any) -> ModelTensors:
        from edge_sdk.model.checkpoint import ModelTensors
        from edge_sdk.model.layout import build_empty

        model: Any = build_empty(self.config, self.task, self._dtype)
        return ModelTensors(model, stored, self.folder, quantizer)

    def load_whole(self, seed: int) -> None:
        """Draw from *seed* what the checkpoint lacks: a head that it was not trained with.

        Raises:
            ModelError: it lacks something else.
        """
        names = [name for part in self.layout.part_names() for name in self.layout.part(part)]
        self.drawn = tuple(name for name in names if name not in self._checkpoint)
        if not self.drawn:
            return
        drawn = self._checkpoint.draw_missing(self._dtype, seed)
        lost = [name for name in names if name in drawn and name not in self.layout.tail]
        if lost:
            raise ModelError(
                f"{self.folder}: {len(lost)} of the model's weights are not in its files, the "
                f"first is {lost[0]!r}; they are incomplete, or those of another model"
            )
        log.warning("model.drawn seed=%d tensors=%s", seed, ",".join(sorted(drawn)))

    def tensors(self, part: str) -> Mapping[str, torch.Tensor]:
        """Return the tensors of *part* by whole-model name, each read when it is asked for.

        Raises:
            ModelError: the folder does not hold them under these names.
        """
        names = self.layout.part(part)
        missing = [name for name in names if name not in self._checkpoint]
        if missing:
            raise ModelError(f"{self.folder}: no tensor {missing[0]!r} (part {part!r})")
        return Some(self._checkpoint, names)

    def pack(self, part: str) -> bytes:
        """Return *part* as the bytes of a safetensors file, the same on every machine."""
        packed = io.BytesIO()
        self.write(part, packed)
        return packed.getvalue()

    def write(self, part: str, sink: Sink) -> None:
        """Write what `pack` returns, a tensor at a time."""
        import torch

        if part != "files":
            write_tensors(self.tensors(part), sink)
            return
        files = {name: (self.folder / name) for name in FILE_NAMES}
        contents = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
        contents["config.json"] = self.config.to_json_string().encode()
        if self._plain_tokenizer is not None:
            contents["tokenizer.json"] = self._plain_tokenizer
        write_tensors(
            {
                name: torch.frombuffer(bytearray(data), dtype=torch.uint8)
                for name, data in contents.items()
                if data
            },
            sink,
        )

    @cached_property
    def _plain_tokenizer(self) -> bytes | None:
        """The tokenizer.json with which a device without transformers tokenises as others do.

        None where that is the one in the folder, as nearly always: some tokenizers are made anew
        by transformers, and blanks around special tokens then differ from what the file says.
        """
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = load_tokenizer(self.folder)
        except ModelError:  # whoever needs it says so
            return None
        made = getattr(tokenizer, "backend_tokenizer", None)
        if made is None or _tokenizes_alike(path, tokenizer):
            return None
        log.info("tokenizer.rewritten file=%s reason=%s", path, "transformers reads it otherwise")
        return str(made.to_str()).encode()

    def describe(self, part: str) -> Part:
        """Return name, hash and size of *part*."""
        digest = _Digest()
        self.write(part, digest)
        return Part(name=part, sha256=digest.hexdigest(), num_bytes=digest.num_bytes)

    def looks_now(self) -> Looks:
        """Return what every file looks like on which the bytes of parts depend."""
        there = [path for path in self.folder.iterdir() if path.is_file()]
        named = [self.folder / name for name in FILE_NAMES]
        return looks_of([*there, *named, *weight_files(self.folder)])

    def part_names(self) -> tuple[str, ...]:
        """Return the names of all parts."""
        return ("files", *self.layout.part_names())


def without_leads(name: str, data: bytes) -> bytes:
    """Return a file of a model that somebody else has sent, without what leads to other files.

    Raises:
        ModelError: it is no JSON, although its name says so.
    """
    if not name.endswith("config.json"):
        return data
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ModelError(f"the coordinator's {name} is no JSON: {one_line(error)}") from error
    left = _without_leads(found)
    return data if left == found else json.dumps(left, indent=2).encode()


def _without_leads(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_leads(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_leads(v) for k, v in value.items() if not LEADS_ELSEWHERE.fullmatch(k)}


def load_config(folder: Path, num_labels: int) -> Any:  # noqa: ANN401 - a transformers config
    """Read config.json; a classifier gets *num_labels* and, if it has none, a padding token."""
    from transformers import AutoConfig

    from edge_sdk.model.layout import without_cache

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        text_config = config.get_text_config()
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder / 'config.json'} cannot be read: {reason}") from error
    without_cache(config)
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
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - tokenizers raise plain Exception, and others more
        raise ModelError(f"{folder}: no tokenizer that can be read: {one_line(error)}") from error


def _tokenizes_alike(path: Path, tokenizer: Any) -> bool:
    """Return whether the tokenizer in the file *path* gives the ids of *tokenizer*."""
    from tokenizers import Tokenizer

    plain: Any = Tokenizer.from_file(str(path))
    plain.no_padding()
    plain.no_truncation()
    special = tokenizer.all_special_tokens[:20]
    probes = [*PROBES, *(f"a {token} b{token}\n{token}c" for token in special)]
    return all(
        plain.encode(text, add_special_tokens=adds).ids
        == tokenizer(text, add_special_tokens=adds, verbose=False)["input_ids"]
        for text in probes
        for adds in (False, True)
    )


def model_hash(parts: Mapping[str, Part]) -> str:
    """Return one hash for a whole model: that of its parts' hashes, in order of their names."""
    return hash_of_parts({name: part.sha256 for name, part in parts.items()})


class _Digest:
    """SHA-256 and size of what is written to it."""

    def __init__(self) -> None:
        self._sha256, self.num_bytes = hashlib.sha256(), 0

    def write(self, data: Any) -> None:
        """Take *data* in."""
        self._sha256.update(data)
        self.num_bytes += memoryview(data).nbytes

    def hexdigest(self) -> str:
        """Return the hash of all that came."""
        return self._sha256.hexdigest()


def open_part(path: Path, *, is_streamed: bool = False) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a part file, memory-mapped; *is_streamed*: see `open_files`."""
    return open_files([path], is_streamed)


# By preference, as transformers has it: each with the index of those that are in several files.
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"


def _open_tensors(folder: Path, is_streamed: bool) -> Mapping[str, torch.Tensor]:
    if paths := _weight_files(folder, SAFETENSORS):
        return open_files(paths, is_streamed)
    if paths := _weight_files(folder, TORCH):
        return open_torch_files(paths)
    raise ModelError(
        f"{folder} holds no weights that can be read, neither {SAFETENSORS} nor {TORCH}; convert "
        "what it holds with a version of transformers that reads it, by save_pretrained"
    )


def has_weights(folder: Path) -> bool:
    """Return whether weights that can be read lie in *folder*."""
    return any(_weight_files(folder, name) for name in (SAFETENSORS, TORCH))


def weight_files(folder: Path) -> list[Path]:
    """Return the files with weights that are read in *folder*; none where there are none."""
    return _weight_files(folder, SAFETENSORS) or _weight_files(folder, TORCH)


def _weight_files(folder: Path, name: str) -> list[Path]:
    """Return the file *name*, or those that its index lists; none where there is neither."""
    index = folder / f"{name}.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            return [folder / name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of files with weights: {error!r}") from error
    return [folder / name] if (folder / name).is_file() else []


def _dtype(config: Any, stored: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Return what transformers calls the dtype of a checkpoint."""
    import torch

    said = getattr(config, "dtype", None)
    if isinstance(said, torch.dtype):
        return said
    floats = (t.dtype for t in map(stored.__getitem__, stored) if t.is_floating_point())
    return next(floats, torch.float32)
