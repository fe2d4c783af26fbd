"""What a slice with all parts of a model computes: a loss, and the tokens that follow a prompt.

Knows no run, no texts and no tokenizer.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdk.errors import ConfigError, ModelError, is_out_of_memory, one_line

if TYPE_CHECKING:
    import torch

    from edge_sdk.data.batches import MicroBatch
    from edge_sdk.model.partition import Slice
    from edge_sdk.runtime.half_range import Products
    from edge_sdk.runtime.interface import TailSums


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

    def __post_init__(self) -> None:
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


def continue_text(
    slice_: Slice, products: Products, ids: Sequence[int], manner: Manner
) -> list[int]:
    """Return the tokens that a slice with all parts adds; the end of the text is not among them.

    Raises:
        ConfigError: there is no room for a token behind so many.
        ModelError: transformers cannot generate with this model.
    """
    import torch

    from edge_sdk.model.layout import usable_positions

    model: Any = slice_.model
    most = usable_positions(model.config, slice_.task)
    if len(ids) >= most:
        raise ConfigError(f"a prompt of {len(ids)} tokens: the model takes {most - 1}")
    ids_BT = torch.tensor([list(ids)], device=slice_.device)
    lengths_B = torch.tensor([len(ids)], device=slice_.device)
    model.eval()

    def generate() -> torch.Tensor:
        try:
            found: torch.Tensor = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                generation_config=_generation(manner, most - len(ids)),
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
            products.run(lambda: slice_.whole(ids_BT, lengths_B), lambda logits: logits)
        if manner.temperature:
            torch.manual_seed(manner.seed)
        found_BT = products.run(generate, lambda ids: ids)
    added: list[int] = found_BT[0, len(ids) :].tolist()
    end = next((n for n, token in enumerate(added) if token in manner.ends), len(added))
    return added[:end]


def _generation(manner: Manner, room: int) -> Any:  # noqa: ANN401 - a transformers config
    """Return how transformers is to go on, for at most as many tokens as there is *room* for."""
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    ends = sorted(manner.ends)
    drawn = {"do_sample": True, "temperature": manner.temperature, "top_k": 0, "top_p": 1.0}
    return make(
        max_new_tokens=min(manner.max_new_tokens, room),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else None,
        **(drawn if manner.temperature else {"do_sample": False}),
    )
