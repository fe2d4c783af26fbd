"""What a run's model says: prompts to tokens, and transformers' own `generate` on the whole model.

Legend: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from coordinator.config.prompts import read_prompts
from coordinator.config.run import EvaluationConfig, ServeConfig
from coordinator.export.check import trained_slice
from edge_sdk.data.encoding import Encoder
from edge_sdk.data.rows import load_rows
from edge_sdk.data.templates import ChatTemplate, TemplateRefusal
from edge_sdk.errors import ConfigError, ModelError, is_out_of_memory, one_line
from edge_sdk.lora.factors import Array, Factors
from edge_sdk.model.layout import usable_positions
from edge_sdk.model.weights import ModelSource
from edge_sdk.runtime.torch_runtime import pick_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a text is continued."""

    max_new_tokens: int = 48
    """Most tokens that are added."""
    temperature: float = 0.0
    """0 takes the most likely token each time; above, tokens are drawn."""
    seed: int = 0
    """Decides what is drawn."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature <= 100.0:
            raise ConfigError(f"temperature must be within 0 and 100, got {self.temperature}")


class Prompting:
    """Makes of a prompt the tokens after which a model trained by this run would answer.

    Args:
        config: The run.
        tokenizer: Its tokenizer.
        form: What a prompt is; None: as the run's `evaluation.prompt_form` says.

    Raises:
        ConfigError: there is no chat template for it, or the run's model writes no text.
        DataError: the evaluation file cannot be read.
    """

    def __init__(self, config: ServeConfig, tokenizer: Any, form: str | None = None) -> None:
        if config.task != "causal-lm":
            raise ConfigError("evaluation.prompts: a classifier writes no text")
        data = config.evaluation.data
        form = form or config.evaluation.prompt_form
        self.form = _form_of_data(config.evaluation) if form == "auto" else form
        self._tokenizer, self._encoder = tokenizer, Encoder(tokenizer)
        self._separator = data.separator if self.form == "completion" else ""
        self._template = ChatTemplate(tokenizer, data.chat_template_kwargs, data.chat_template)
        if self.form == "chat" and not self._template.is_there:
            raise ConfigError("evaluation.prompt_form: chat, but the model has no chat template")

    def ids(self, prompt: str) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            ConfigError: the chat template refuses it, or it is empty.
        """
        if self.form == "chat":
            turns = [{"role": "user", "content": prompt}]
            try:
                text = self._template.render(turns, ask=True).text
            except TemplateRefusal as error:
                raise ConfigError(f"the chat template refuses the prompt: {error}") from error
            ids = self._encoder.texts([text])[0]  # a template writes its own special tokens
        else:
            ids = self._encoder.texts([prompt + self._separator])[0]
            bos = self._encoder.bos
            ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        if not ids:
            raise ConfigError("a prompt must not be empty")
        return ids

    @property
    def ends(self) -> list[int]:
        """The tokens that training puts behind a text, or an answer."""
        end = self._tokenizer.eos_token_id
        return [] if end is None else [end]

    def text(self, ids: Sequence[int]) -> str:
        """Return what tokens say, without special ones."""
        said: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return said


def _form_of_data(evaluation: EvaluationConfig) -> str:
    """Return what the first row of the evaluation file is; text where there is no file."""
    if evaluation.data.path is None:
        return "text"
    return load_rows(None, replace(evaluation.data, limit=1))[0].schema


class Speaker:
    """The whole model with what a run has learned, in float32.

    Args:
        source: The base.
        learned: dW by weight; empty: the base alone speaks.
        head: Parameters that were trained in full.
        device: Where it computes, as the run's `device`.
        ends: Tokens that end a text, beside those that the model itself names.
    """

    def __init__(
        self,
        source: ModelSource,
        learned: Mapping[str, Factors],
        head: Mapping[str, Array],
        device: str,
        ends: Sequence[int] = (),
    ) -> None:
        self._most = usable_positions(source.config, source.task)
        self._ends = sorted({*_ends(source.folder, source.config), *ends})
        self._device = pick_device(device)
        self._model: Any = trained_slice(source, learned, head).model.to(self._device)

    def add_to(self, ids: Sequence[int], manner: Manner) -> list[int]:
        """Return the tokens that the model adds; the end of the text is not among them.

        Raises:
            ConfigError: there is no room for a token behind so many.
            ModelError: transformers cannot generate with this model.
        """
        room = self._most - len(ids)
        if room < 1:
            raise ConfigError(f"a prompt of {len(ids)} tokens: the model takes {self._most - 1}")
        ids_BT = torch.tensor([list(ids)], device=self._device)
        with torch.no_grad(), torch.random.fork_rng(enabled=bool(manner.temperature)):
            if manner.temperature:
                torch.manual_seed(manner.seed)
            try:
                found_BT = self._model.generate(
                    ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    generation_config=_generation(self._ends, manner, room),
                )
            except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
                if is_out_of_memory(error):
                    raise
                raise ModelError(
                    f"transformers cannot generate with this model: {one_line(error)}"
                ) from error
        added: list[int] = found_BT[0, len(ids) :].tolist()
        end = next((n for n, token in enumerate(added) if token in self._ends), len(added))
        return added[:end]


def _generation(ends: Sequence[int], manner: Manner, room: int) -> Any:
    """Return how transformers is to go on, for at most as many tokens as there is *room* for."""
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    drawn = {"do_sample": True, "temperature": manner.temperature, "top_k": 0, "top_p": 1.0}
    return make(
        max_new_tokens=min(manner.max_new_tokens, room),
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else None,
        **(drawn if manner.temperature else {"do_sample": False}),
    )


def _ends(folder: Path, config: Any) -> set[int]:
    """Return the tokens that end a text, by the model's own word."""
    from transformers import GenerationConfig

    found: list[Any] = [config.get_text_config().eos_token_id]
    if (folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        found.append(own.eos_token_id)
    flat = [t for each in found for t in (each if isinstance(each, list) else [each])]
    return {token for token in flat if token is not None}


class Sayings:
    """The texts that a run shows of its model at each evaluation: `evaluation.prompts`.

    Raises:
        ConfigError: a prompt cannot be answered.
        DataError: a file cannot be read.
    """

    def __init__(self, config: ServeConfig, source: ModelSource, tokenizer: Any) -> None:
        self._source, self._device = source, config.device
        self._manner = Manner(max_new_tokens=config.evaluation.max_new_tokens)
        self._prompts: dict[str, list[int]] = {}
        if prompts := read_prompts(config.evaluation):
            self._prompting = Prompting(config, tokenizer)
            self._prompts = {prompt: self._prompting.ids(prompt) for prompt in prompts}
            most = usable_positions(source.config, source.task)
            for prompt, ids in self._prompts.items():
                if len(ids) >= most:
                    raise ConfigError(
                        f"evaluation.prompts: {prompt[:40]!r}... has {len(ids)} tokens, the model "
                        f"takes {most - 1}"
                    )

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def say(
        self, learned: Mapping[str, Factors], head: Mapping[str, Array]
    ) -> list[tuple[str, str]]:
        """Return what the model with *learned* says to each prompt."""
        speaker = Speaker(self._source, learned, head, self._device, self._prompting.ends)
        return [
            (prompt, self._prompting.text(speaker.add_to(ids, self._manner)))
            for prompt, ids in self._prompts.items()
        ]
