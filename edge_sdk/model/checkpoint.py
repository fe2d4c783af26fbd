"""A checkpoint's tensors under the names of a model, each converted when it is asked for.

What lies on disk may have other names, may be one file for each expert where the model has one
tensor for all, or may be kept in 8 or 4 bits. transformers knows how (its conversion mapping) and
applies that to whole models; here it is applied to one tensor at a time, to the same bits. Knows no
folders and no parts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.auto import AutoHfQuantizer

from edge_sdk.errors import ModelError, one_line

Tensors = Mapping[str, torch.Tensor]


@dataclass
class _Converted:
    """What one conversion reads: names on disk, each with the pattern that it matched."""

    converter: Any
    first: str
    """The model's name of the first tensor that comes of it."""
    sources: list[tuple[str, str]] = field(default_factory=list)

    def targets(self) -> list[str]:
        """Return the model's names of all tensors that come of it."""
        patterns = self.converter.target_patterns
        return [self.first.replace(patterns[0], pattern, 1) for pattern in patterns]


class ModelTensors(Mapping[str, torch.Tensor]):
    """The tensors in *stored* under the names of *model*, which has no weights.

    Raises:
        ModelError: a tensor, when it is asked for, cannot be converted or has another shape.
    """

    def __init__(
        self, model: PreTrainedModel, stored: Tensors, where: object, quantizer: Any = None
    ) -> None:
        """Find out what becomes what, by names alone; nothing is read.

        Args:
            model: The model whose names are wanted; its parameters are on the meta device.
            stored: What lies on disk.
            where: What messages begin with.
            quantizer: Makes weights that are kept in 8 or 4 bits dense; see `take_quantizer`.
        """
        self._stored, self._model, self._where = stored, model, where
        self._empty: dict[str, torch.Tensor] = model.state_dict()
        # What some models compute in float32 whatever the rest is in, routers of experts mostly.
        self._wide = [n.replace("*", ".*") for n in model._keep_in_fp32_modules_strict or ()]
        self._drawn: dict[str, torch.Tensor] = {}
        self._places: dict[str, str | _Converted] = {}
        rules = get_model_conversion_mapping(model, hf_quantizer=quantizer)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        for name in sorted(stored, key=dot_natural_key):
            self._place(name, renamings)
        tied = self._tied().items()
        for one, other in (*tied, *((b, a) for a, b in tied)):  # either stands for both
            if one in self._places:
                self._places.setdefault(other, self._places[one])

    def _place(self, name: str, renamings: list[Any]) -> None:
        """Note what becomes of the tensor *name* on disk."""
        prefix = self._model.base_model_prefix
        found, pattern = rename_source_key(name, renamings, self._converters, prefix, self._empty)
        if found not in self._empty and name in self._empty:
            found, pattern = rename_source_key(name, [], [], prefix, self._empty)
        if found not in self._empty:
            return  # of a head or a tower that this model does not have
        if pattern is None:
            self._places.setdefault(found, name)
            return
        place = self._places.get(found)
        if not isinstance(place, _Converted):
            # Of several with this pattern the last, as in transformers.
            converters = [c for c in self._converters if pattern in c.source_patterns]
            place = _Converted(converters[-1], found)
            self._places.update(dict.fromkeys(place.targets(), place))
        place.sources.append((pattern, name))

    def _tied(self) -> dict[str, str]:
        """Return names that are tied to others, each with the one that stands in its place."""
        tied: dict[str, str] = self._model.all_tied_weights_keys
        return tied

    def differs_where_tied(self) -> bool:
        """Return whether the checkpoint has two values for what the config calls one tensor."""
        both = [(a, b) for a, b in self._tied().items() if a in self and b in self]
        return any(self._places[a] != self._places[b] for a, b in both) and not all(
            torch.equal(self[a], self[b]) for a, b in both
        )

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._drawn:
            return self._drawn[name]
        place = self._places[name]
        try:
            tensor = self._stored[place] if isinstance(place, str) else self._convert(place)[name]
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = one_line(error)
            raise ModelError(f"{self._where}: {name} cannot be made: {reason}") from error
        wanted = self._empty[name].shape
        if tensor.shape != wanted:
            shapes = f"shape {tuple(tensor.shape)}, the config says {tuple(wanted)}"
            raise ModelError(f"{self._where}: {name}: {shapes}")
        is_half = tensor.dtype in (torch.bfloat16, torch.float16)
        return tensor.float() if is_half and self._is_wide(name) else tensor

    def _is_wide(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self._wide)

    def _convert(self, place: _Converted) -> Tensors:
        converter = copy.deepcopy(place.converter)
        for pattern, name in place.sources:
            # Read when their turn comes, and gone before the next step begins.
            read: Any = partial(self._stored.__getitem__, name)
            converter.add_tensor(place.first, name, pattern, read)
        made = converter.convert(place.first, model=self._model, config=self._model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def draw_missing(self, dtype: torch.dtype, seed: int) -> set[str]:
        """Draw what is missing from *seed*, as transformers does; returns the names of parameters.

        transformers loads a checkpoint whose tensors take no memory; what is not in it, it makes as
        it would for a real one.
        """
        model: Any = type(self._model)
        hollow = {n: torch.zeros((), dtype=dtype).expand(self._empty[n].shape) for n in self}
        torch.manual_seed(seed)
        made, about = model.from_pretrained(
            None,
            config=self._model.config,
            state_dict=hollow,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        state = made.state_dict()
        parameters = {name for name, _ in made.named_parameters(remove_duplicate=False)}
        self._drawn = {name: state[name] for name in state.keys() - hollow.keys()}
        return parameters.intersection(about["missing_keys"])

    def __iter__(self) -> Iterator[str]:
        return iter({**self._places, **self._drawn})

    def __len__(self) -> int:
        return len({**self._places, **self._drawn})


def take_quantizer(config: Any, where: object) -> Any:
    """Return what makes dense weights of those that *config* calls quantised; None if none are.

    The config says so no longer: whoever reads it from now on is given dense weights.

    Raises:
        ModelError: weights of that kind are not made dense.
    """
    said = quantization_of(config)
    if not said:
        return None
    quantizer, reason = None, "transformers has no way to"
    try:
        made: Any = AutoHfQuantizer.from_config(said, pre_quantized=True)
        quantizer = made if "dequantize" in made.get_load_operations() else None
    except (ImportError, ValueError, TypeError) as error:
        reason = one_line(error)[:120]
    if quantizer is None:
        method = said.get("quant_method", "other means") if isinstance(said, dict) else "others"
        raise ModelError(
            f"{where}: its weights are quantised by {method}, and cannot be made dense ({reason}); "
            "take the model that it was made from, with base: int8 or int4 where memory is short"
        )
    quantizer.quantization_config.dequantize = True
    for owner in (config, config.get_text_config()):
        owner.__dict__.pop("quantization_config", None)
    return quantizer


def quantization_of(config: Any) -> Any:
    """Return what *config* says of how the weights on disk are quantised; None if they are not."""
    owners = (config, config.get_text_config())
    return next(filter(None, (getattr(o, "quantization_config", None) for o in owners)), None)
