"""The whole model with what was learned merged in, written shard by shard.

At no time does all of the model lie in memory: a part is read, changed, and put into the shard that
is being filled. Legend: B sequences, T positions.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coordinator.export.card import Card
from coordinator.export.check import ExportError, compare_stretch
from coordinator.export.facts import RunFacts
from coordinator.export.options import Dtype
from coordinator.export.peft_names import is_stacked
from edge_sdk.errors import NumericError
from edge_sdk.files import private_files, storage_errors
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.model.experts import lies_transposed
from edge_sdk.model.layout import build_empty, is_transposed
from edge_sdk.model.safetensors_files import open_files, write_tensors
from edge_sdk.model.weights import FILE_NAMES, ModelSource, load_tokenizer

log = logging.getLogger(__name__)

# Most bytes of a file of weights, which lie in memory until it is full.
SHARD_BYTES = 1 << 30
INDEX = "model.safetensors.index.json"
MODELFILE = """\
# For `ollama create NAME -f Modelfile`, in this folder.
FROM .
"""


def export_merged(
    source: ModelSource,
    learned: Mapping[str, Factors],
    head: Mapping[str, Array],
    folder: Path,
    facts: RunFacts | None = None,
    *,
    dtype: Dtype | None = None,
) -> float:
    """Write the whole model, *learned* added to its weights.

    Args:
        source: The base.
        learned: dW by weight.
        head: Parameters that were trained in full.
        folder: What is written.
        facts: How the model came about, for its card.
        dtype: Dtype of all weights; None: each keeps the one that it has in the base.

    Returns:
        The largest difference of a logit to the coordinator's model, relative: rounding to *dtype*
        included. Of a model too large to be held in memory it is that of a hidden state.

    Raises:
        ExportError: what was written, read back, is something else.
        NumericError: a weight is beyond the range of *dtype*.
        StorageError: the folder cannot be written.
    """
    merging = _Merging(source, learned, head, dtype)
    with storage_errors(f"model {folder}"), private_files():
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(merging, folder)
        _write_config(merging, folder, facts)
        for name in FILE_NAMES:
            if name != "config.json" and (source.folder / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.folder / name, folder / name)
        if source.task == "sequence-classification":
            _pad_alike(folder, source.config.get_text_config().pad_token_id)
        if source.task == "causal-lm":
            (folder / "Modelfile").write_text(MODELFILE, encoding="utf-8")
        card = Card(source=source, format="merged", ranks={}, facts=facts, dtype=merging.dtype_name)
        (folder / "README.md").write_text(card.text(), encoding="utf-8")
    written = ModelSource(str(folder), source.task, num_labels=_num_labels(source))
    written.load_whole(0)
    _compare_tensors(merging, written, folder)
    return compare_stretch(source, learned, head, written, merging.tensors)


class _Merging:
    """The tensors of the merged model, each computed when it is asked for."""

    def __init__(
        self,
        source: ModelSource,
        learned: Mapping[str, Factors],
        head: Mapping[str, Array],
        dtype: Dtype | None,
    ) -> None:
        self.source = source
        self.model: Any = build_empty(source.config, source.task, torch.float32)
        self._changes = {
            name if is_stacked(factors) else f"{name}.weight": factors
            for name, factors in learned.items()
        }
        self._head = head
        self._dtype: torch.dtype | None = None if dtype is None else getattr(torch, dtype)

    @property
    def dtype_name(self) -> str:
        """Dtype of the weights as written: that of the first block's."""
        tensors = self.source.tensors("block.0")
        found = (self._dtype or t.dtype for t in tensors.values() if t.is_floating_point())
        return str(next(found, torch.float32)).removeprefix("torch.")

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        """Return the tensors of *part* by whole-model name."""
        return {name: self._tensor(name, t) for name, t in self.source.tensors(part).items()}

    def cast(self, name: str, value: torch.Tensor, own: torch.dtype) -> torch.Tensor:
        """Return *value* in the dtype in which it is written; *own* is that in the base."""
        if not value.is_floating_point():
            return value
        dtype = self._dtype or own
        written = value.to(dtype)
        if dtype != value.dtype and not torch.isfinite(written).all() and value.isfinite().all():
            raise NumericError(
                f"{name}: holds numbers beyond the range of {str(dtype).removeprefix('torch.')}; "
                "choose --dtype bfloat16 or float32"
            )
        return written

    def _tensor(self, name: str, value: torch.Tensor) -> torch.Tensor:
        own = value.dtype
        if name in self._head:
            value = torch.from_numpy(np.array(self._head[name]))
        if (factors := self._changes.get(name)) is not None and factors.rank:
            module = self.model.get_submodule(name.rpartition(".")[0])
            if is_stacked(factors):
                value = _with_experts(value, factors, turned=lies_transposed(module))
            else:
                change = torch.from_numpy(factors.dense())
                value = value.float() + (change.T if is_transposed(module) else change)
        return self.cast(name, value, own)


def _with_experts(weight: torch.Tensor, factors: Factors, *, turned: bool) -> torch.Tensor:
    """Return the matrices of all experts with what was learned of each, one after the other."""
    merged = weight.detach().to(torch.float32, copy=True)
    for matrix, b_OR, a_RI in zip(merged, *factors, strict=True):
        change = torch.from_numpy(b_OR @ a_RI)
        matrix += change.T if turned else change
    return merged


class _Shards:
    """Files of weights, each written when it is full; their names are known at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._filling: dict[str, torch.Tensor] = {}
        self._files: list[list[str]] = []
        self._total_bytes = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put *tensors* into the shard that is being filled; begin another where it is full."""
        for name, tensor in tensors.items():
            if self._filling and _num_bytes(self._filling) + tensor.nbytes > SHARD_BYTES:
                self._flush()
            self._filling[name] = tensor
            self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Give the files their names and write the index."""
        self._flush()
        last = len(self._files)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._files, start=1):
            final = f"model-{number:05d}-of-{last:05d}.safetensors" if last > 1 else _SINGLE
            _shard(self._folder, number).replace(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        if last > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / INDEX).write_text(text, encoding="utf-8")

    def _flush(self) -> None:
        if not self._filling:
            return
        self._files.append(list(self._filling))
        path = _shard(self._folder, len(self._files))
        with path.open("wb") as file:  # the library's own would copy all of them first
            write_tensors(self._filling, file, {"format": "pt"})
        self._filling = {}


_SINGLE = "model.safetensors"


def _shard(folder: Path, number: int) -> Path:
    return folder / f".model-{number:05d}.safetensors"


def _num_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_weights(merging: _Merging, folder: Path) -> None:
    """Write all tensors under the names that checkpoints of this family have on disk."""
    from transformers.core_model_loading import revert_weight_conversion

    model, layout, shards = merging.model, merging.source.layout, _Shards(folder)
    for part in layout.part_names():
        shards.add(revert_weight_conversion(model, merging.tensors(part)))
    # What a run on text never calls, such as the part of a model that sees pictures.
    state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    called = {id(state[name]) for part in layout.part_names() for name in layout.part(part)}
    others = {name: tensor for name, tensor in state.items() if id(tensor) not in called}
    on_disk = _on_disk(merging.source.folder)
    for name in sorted(revert_weight_conversion(model, others).keys() & on_disk.keys()):
        shards.add({name: merging.cast(name, on_disk[name], on_disk[name].dtype)})
    shards.finish()


def _on_disk(folder: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors that lie in *folder*, each read when it is asked for."""
    names = ["model.safetensors"]
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
    return open_files([folder / n for n in names if (folder / n).is_file()], is_streamed=True)


def _write_config(merging: _Merging, folder: Path, facts: RunFacts | None) -> None:
    from transformers import AutoConfig, GenerationConfig

    source = merging.source
    # As it was, cache included.
    config: Any = AutoConfig.from_pretrained(
        source.folder, trust_remote_code=False, local_files_only=True
    )
    for part, own in zip(_both(config), _both(source.config), strict=True):
        part.tie_word_embeddings = own.tie_word_embeddings
        part.__dict__.pop("quantization_config", None)  # what is written is dense
    config.architectures = [type(merging.model).__name__]
    config.dtype = getattr(torch, merging.dtype_name)
    if source.task == "sequence-classification":
        names = facts.label_names if facts is not None and facts.label_names else None
        config.num_labels = _num_labels(source)
        if names is not None:
            config.id2label = dict(enumerate(names))
            config.label2id = {name: n for n, name in enumerate(names)}
        pad_token_id = source.config.get_text_config().pad_token_id
        config.pad_token_id = config.get_text_config().pad_token_id = pad_token_id
    config.save_pretrained(folder)
    if source.task == "causal-lm" and not (source.folder / "generation_config.json").is_file():
        GenerationConfig.from_model_config(copy.deepcopy(config)).save_pretrained(folder)


def _pad_alike(folder: Path, pad_token_id: int) -> None:
    """Let the tokenizer pad with the token by which a decoder with a head for classes pools."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id == pad_token_id:
        return
    token = tokenizer.convert_ids_to_tokens(pad_token_id)
    for told in (path, folder / "special_tokens_map.json"):
        if told.is_file():
            settings = json.loads(told.read_text(encoding="utf-8")) | {"pad_token": token}
            told.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _both(config: Any) -> tuple[Any, Any]:
    """Return a config and the part of it that speaks of text, which may be the same."""
    return config, config.get_text_config()


def _num_labels(source: ModelSource) -> int:
    return source.config.num_labels if source.task == "sequence-classification" else 0


def _compare_tensors(merging: _Merging, written: ModelSource, folder: Path) -> None:
    """Compare what was written, tensor by tensor, with what was to be written.

    Raises:
        ExportError: a tensor is another one.
    """
    if written.layout != merging.source.layout:
        raise ExportError(f"{folder}: read back, it is another model than its base")
    for part in written.layout.part_names():
        found = written.tensors(part)
        for name, expected in merging.tensors(part).items():
            if not torch.equal(found[name], expected):
                raise ExportError(f"{folder}: read back, {name} is not what was written")
    log.info("export.compared folder=%s", folder)
