"""An export, read back, must compute what the coordinator's model computes.

Legend: B sequences, T positions.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edge_sdk.errors import EdgeError
from edge_sdk.lora.adapters import Adapters
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.lora.targets import LoraConfig
from edge_sdk.model.layout import auto_class
from edge_sdk.model.partition import Slice
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.torch_runtime import load_parameters

log = logging.getLogger(__name__)

# Largest difference of a logit between the coordinator's model and the export read back.
TOLERANCE = 1e-5
# Most bytes of a model in float32 that is run as a whole to check it once it is merged.
CHECK_BYTES = 1 << 30


class ExportError(EdgeError):
    """The export, read back, is not the model that was trained."""


def load_base(source: ModelSource) -> nn.Module:
    """Load the whole model in float32, as transformers does.

    One whose weights lie quantised on disk is made of the dense weights that the run had.
    """
    from transformers import AutoConfig

    on_disk = AutoConfig.from_pretrained(
        source.folder, trust_remote_code=False, local_files_only=True
    )
    if any(hasattr(c, "quantization_config") for c in (on_disk, on_disk.get_text_config())):
        return _slice_of(source, source.layout.part_names(), source.tensors).model
    factory = auto_class(source.config, source.task)
    config = copy.deepcopy(source.config)
    dtype: Any = torch.float32
    if source.quantization is not None:
        # Made dense in the dtype in which the run had it made dense.
        config.quantization_config, dtype = source.quantization, "auto"
    model: nn.Module = factory.from_pretrained(
        source.folder, config=config, dtype=dtype, trust_remote_code=False, local_files_only=True
    )
    return model.float()


def trained_slice(
    source: ModelSource, learned: Mapping[str, Factors], head: Mapping[str, Array]
) -> Slice:
    """Load the whole model in float32: the base, and dW as factors."""
    slice_ = _slice_of(source, source.layout.part_names(), source.tensors)
    learn(slice_, learned, head)
    slice_.model.eval()
    return slice_


def _slice_of(
    source: ModelSource,
    parts: Sequence[str],
    tensors: Callable[[str], Mapping[str, torch.Tensor]],
) -> Slice:
    """Return a slice in float32, of *parts* as *tensors* gives them."""
    slice_ = Slice(source.config, source.task, source.layout, torch.float32)
    for part in parts:
        slice_.add(part, tensors(part))
    return slice_


def learn(slice_: Slice, learned: Mapping[str, Factors], head: Mapping[str, Array]) -> None:
    """Give a slice, all of it or its first blocks, what a run has learned."""
    own = {name for part in slice_.present for name in slice_.layout.part(part)}
    adapters = Adapters(slice_, {}, {}, LoraConfig())
    adapters.set_residual({n: f for n, f in learned.items() if n in own or f"{n}.weight" in own})
    values = {n: v for n, v in head.items() if n in own}
    load_parameters({n: slice_.model.get_parameter(n) for n in values}, values)


def verify(
    source: ModelSource,
    learned: Mapping[str, Factors],
    head: Mapping[str, Array],
    folder: Path,
) -> float:
    """Return by how much the model with the adapter in *folder* differs from what was trained.

    PEFT reads the adapter. A model that fits `CHECK_BYTES` is run as a whole; of a larger one only
    its first blocks. One model at a time lies in memory.

    Args:
        source: The base.
        learned: dW by weight.
        head: Parameters that were trained in full.
        folder: The adapter.

    Returns:
        The largest difference of a logit or hidden state, relative.

    Raises:
        ExportError: it is more than rounding.
    """
    num_blocks = _blocks_that_fit(source)
    parts = _stretch(source, num_blocks)
    ours = _slice_of(source, parts, source.tensors)
    learn(ours, learned, head)
    expected = _answer(ours, num_blocks)
    del ours
    difference = _relative(expected, _peft_answer(source, parts, num_blocks, folder))
    _refuse_more_than_rounding(folder, difference)
    log.info("export.verified folder=%s difference=%.1e", folder, difference)
    return difference


def _peft_answer(
    source: ModelSource, parts: Sequence[str], num_blocks: int, folder: Path
) -> torch.Tensor:
    """Return what `_answer` does, of the base with an adapter that PEFT has read."""
    from peft import PeftModel

    if num_blocks == source.layout.num_blocks:
        loaded: Any = PeftModel.from_pretrained(load_base(source), folder, local_files_only=True)
        ids_BT, _ = _inputs(source)
        with torch.no_grad():
            found: torch.Tensor = loaded.eval()(
                input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)
            ).logits
        return found
    base = _slice_of(source, parts, source.tensors)
    # Where blocks are absent an adapter has to be made of its file: there is nothing to copy into.
    PeftModel.from_pretrained(
        base.model,
        folder,
        local_files_only=True,
        low_cpu_mem_usage=True,
    )
    return _answer(base, num_blocks)


def _stretch(source: ModelSource, num_blocks: int) -> list[str]:
    """Return the parts of the first blocks, and the tail if these are all."""
    is_whole = num_blocks == source.layout.num_blocks
    return ["front", *(f"block.{i}" for i in range(num_blocks)), *(["tail"] if is_whole else [])]


def compare_stretch(
    source: ModelSource,
    learned: Mapping[str, Factors],
    head: Mapping[str, Array],
    written: ModelSource,
    tensors: Callable[[str], Mapping[str, torch.Tensor]],
) -> float:
    """Compare a merged model with what was to be written, and with what was trained.

    A model that fits `CHECK_BYTES` is run as a whole, by transformers; of a larger one only its
    first blocks.

    Args:
        source: The base.
        learned: dW by weight.
        head: Parameters that were trained in full.
        written: What was written, opened again.
        tensors: Returns the tensors of a part as they were to be written.

    Returns:
        The largest difference of a logit or hidden state between *written* and what was trained.

    Raises:
        ExportError: *written* is not what was to be written.
    """
    num_blocks = _blocks_that_fit(source)
    is_whole = num_blocks == source.layout.num_blocks
    parts = _stretch(source, num_blocks)
    expected = _answer(_slice_of(source, parts, tensors), num_blocks)
    if is_whole:
        ids_BT, _ = _inputs(source)
        with torch.no_grad():
            model = load_base(written).eval()
            found = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
        del model
    else:
        found = _answer(_slice_of(written, parts, written.tensors), num_blocks)
    _refuse_more_than_rounding(written.folder, _relative(expected, found))
    trained = _slice_of(source, parts, source.tensors)
    learn(trained, learned, head)
    difference = _relative(_answer(trained, num_blocks), found)
    log.info("export.verified folder=%s difference=%.1e", written.folder, difference)
    return difference


def _answer(slice_: Slice, num_blocks: int) -> torch.Tensor:
    """Return the logits of a whole model, or the hidden state after so many blocks of one."""
    ids_BT, lengths_B = _inputs(slice_)
    slice_.model.eval()
    with torch.no_grad():
        if num_blocks == slice_.layout.num_blocks:
            return slice_.whole(ids_BT, lengths_B)
        return slice_.front(ids_BT, lengths_B, num_blocks)


def _inputs(of: ModelSource | Slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids (B, T) and lengths (B) that show a difference."""
    config: Any = of.config if isinstance(of, ModelSource) else of.model.config
    vocab = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab, (2, 16), generator=generator), torch.tensor([16, 16])


def _relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())


def _refuse_more_than_rounding(folder: Path, difference: float) -> None:
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{folder}: read back, its logits differ by {difference:.1e} (relative), "
            f"more than {TOLERANCE:.0e}"
        )


def _blocks_that_fit(source: ModelSource) -> int:
    """Return how many blocks are run to check a model: all, or as many as `CHECK_BYTES` holds."""
    sizes = [
        4 * sum(tensor.numel() for tensor in source.tensors(part).values())
        for part in source.layout.part_names()
    ]
    if sum(sizes) <= CHECK_BYTES:
        return source.layout.num_blocks
    return 1
