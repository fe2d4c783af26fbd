"""What a slice with all parts of a model computes: a loss, classes, tokens that follow a prompt.

Knows no run, no texts and no tokenizer.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError, ModelError, is_out_of_memory, one_line

if TYPE_CHECKING:
    import torch

    from edge_sdk.data.batches import MicroBatch
    from edge_sdk.model.partition import Slice
    from edge_sdk.runtime.half_range import Products
    from edge_sdk.runtime.interface import TailSums


IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a text is continued."""

    max_new_tokens: int = 48
    """Most tokens that are added."""
    temperature: float = 0.0
    """0 takes the most likely token each time; above, tokens are drawn."""
    seed: int = 0
    """Decides what is drawn."""
    ends: tuple[int, ...] = ()
    """Tokens that end a text."""
    num_beams: int = 1
    """Beams of the search; 1: there is none."""
    length_penalty: float = 1.0
    """Power of a beam's length by which its log-probability is divided."""
    no_repeat_ngram_size: int = 0
    """Tokens of a run that may stand in prompt and text only once; 0: no rule."""
    batch_size: int = 16
    """Most prompts that are continued together."""

    def __post_init__(self) -> None:
        if self.temperature and self.num_beams > 1:
            raise ConfigError("temperature: beams are searched, not drawn; leave one of them out")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(f"temperature must be within 0 and 100, got {self.temperature}")


def evaluate_whole(slice_: Slice, products: Products, micro: MicroBatch) -> TailSums:
    """Return the loss of a micro-batch, without dropout."""
    import torch

    from edge_sdk.model.loss import whole_sums
    from edge_sdk.runtime.torch_runtime import totals

    slice_.model.eval()
    ids_BT, lengths_B, labels = (
        torch.from_numpy(np.ascontiguousarray(x)).to(slice_.device) for x in micro[:3]
    )
    work = partial(whole_sums, slice_, ids_BT, lengths_B, labels.long())
    with torch.no_grad():
        return totals(products.run(work, lambda sums: sums.loss_B))


def predict_whole(slice_: Slice, products: Products, micro: MicroBatch) -> IntArray:
    """Return the most likely class (B,) of each sequence of a micro-batch, without dropout."""
    import torch

    slice_.model.eval()
    ids_BT, lengths_B = (
        torch.from_numpy(np.ascontiguousarray(x)).to(slice_.device) for x in micro[:2]
    )
    with torch.no_grad():
        logits_BC = products.run(lambda: slice_.whole(ids_BT, lengths_B), lambda logits: logits)
    found: IntArray = logits_BC.argmax(-1).cpu().numpy()
    return found


def continue_texts(
    slice_: Slice, products: Products, prompts: Sequence[Sequence[int]], manner: Manner
) -> list[list[int]]:
    """Return the tokens that a slice with all parts adds to each prompt, the text's end left out.

    What is added to a prompt does not depend, but for rounding, on the others that are continued
    with it: prompts of like length are, and one that leaves the model too few positions for all of
    `max_new_tokens` is alone.

    Raises:
        ConfigError: there is no room for a token behind so many.
        ModelError: transformers cannot generate with this model.
    """
    from edge_sdk.model.layout import usable_positions

    model: Any = slice_.model
    most = usable_positions(model.config, slice_.task)
    lengths = [len(ids) for ids in prompts]
    if (longest := max(lengths, default=0)) >= most:
        raise ConfigError(f"a prompt of {longest} tokens: the model takes {most - 1}")
    model.eval()
    found: dict[int, list[int]] = {}
    for batch in _batched(lengths, manner.batch_size, most - manner.max_new_tokens):
        how = _generation(manner, most - max(lengths[n] for n in batch))
        added = _continued(slice_, products, [prompts[n] for n in batch], manner, how)
        found.update(zip(batch, added, strict=True))
    return [found[n] for n in range(len(prompts))]


def _batched(lengths: Sequence[int], batch_size: int, most: int) -> list[list[int]]:
    """Return which prompts are continued together: those of like length; one above *most* alone."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    fitting = [n for n in order if lengths[n] <= most]
    together = [fitting[n : n + batch_size] for n in range(0, len(fitting), batch_size)]
    return together + [[n] for n in order if lengths[n] > most]


def _continued(
    slice_: Slice,
    products: Products,
    prompts: Sequence[Sequence[int]],
    manner: Manner,
    how: Any,  # noqa: ANN401 - a transformers config
) -> list[list[int]]:
    """Return the tokens that are added to each prompt of a batch."""
    import torch

    longest = max(map(len, prompts))
    # No text holds an end, so that what stands before a prompt repeats nothing of it.
    blank = min(manner.ends, default=0)
    gaps = [longest - len(ids) for ids in prompts]
    padded = [[blank] * gap + list(ids) for gap, ids in zip(gaps, prompts, strict=True)]
    ids_BT = torch.tensor(padded, device=slice_.device)
    is_real_BT = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    mask_BT = is_real_BT.to(slice_.device)

    def generate() -> torch.Tensor:
        model: Any = slice_.model
        try:
            found: torch.Tensor = model.generate(
                ids_BT, attention_mask=mask_BT, generation_config=how
            )
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"transformers cannot generate with this model: {one_line(error)}"
            ) from error
        return found

    with torch.no_grad(), torch.random.fork_rng(enabled=bool(manner.temperature)):
        if products.dtype == torch.float16:  # tokens tell nothing of numbers that had no room
            # A slice pads on the right: the texts begin in the first column.
            begun = [[*ids, *[blank] * gap] for gap, ids in zip(gaps, prompts, strict=True)]
            begun_BT = torch.tensor(begun, device=slice_.device)
            lengths_B = mask_BT.sum(1)
            products.run(lambda: slice_.whole(begun_BT, lengths_B), lambda logits: logits)
        if manner.temperature:
            torch.manual_seed(manner.seed)
        found_BT = products.run(generate, lambda ids: ids)
    return [_before_end(row, manner.ends) for row in found_BT[:, longest:].tolist()]


def _before_end(added: list[int], ends: Sequence[int]) -> list[int]:
    end = next((n for n, token in enumerate(added) if token in ends), len(added))
    return added[:end]


def _generation(manner: Manner, room: int) -> Any:  # noqa: ANN401 - a transformers config
    """Return how transformers is to go on, for at most as many tokens as there is *room* for."""
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    ends = sorted(manner.ends)
    beams = {
        "num_beams": manner.num_beams,
        "length_penalty": manner.length_penalty,
        "no_repeat_ngram_size": manner.no_repeat_ngram_size,
    }
    drawn = {"do_sample": True, "temperature": manner.temperature, "top_k": 0, "top_p": 1.0}
    return make(
        max_new_tokens=min(manner.max_new_tokens, room),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,
        **beams,
        **(drawn if manner.temperature else {"do_sample": False}),
    )
