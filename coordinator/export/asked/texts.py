"""What a run's model says: prompts to tokens, and tokens to texts.

What computes is an engine, or a model of `trained.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from coordinator.config.prompts import read_prompts
from coordinator.config.run import EvaluationConfig, ServeConfig
from coordinator.engine.whole import Manner
from edge_sdk.data.encoding import Encoder
from edge_sdk.data.rows import load_rows
from edge_sdk.data.templates import ChatTemplate, TemplateRefusal
from edge_sdk.errors import ConfigError
from edge_sdk.model.layout import usable_positions
from edge_sdk.model.weights import ModelSource


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


def text_ends(source: ModelSource) -> set[int]:
    """Return the tokens that end a text, by the model's own word."""
    from transformers import GenerationConfig

    found: list[Any] = [source.config.get_text_config().eos_token_id]
    if (source.folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True
        )
        found.append(own.eos_token_id)
    flat = [t for each in found for t in (each if isinstance(each, list) else [each])]
    return {token for token in flat if token is not None}


Speak = Callable[[Sequence[Sequence[int]], Manner], list[list[int]]]
"""Returns the tokens that a model adds to each prompt."""


class Sayings:
    """The texts that a run shows of its model at each evaluation: `evaluation.prompts`.

    Raises:
        ConfigError: a prompt cannot be answered.
        DataError: a file cannot be read.
    """

    def __init__(self, config: ServeConfig, source: ModelSource, tokenizer: Any) -> None:
        self._prompts: dict[str, list[int]] = {}
        if prompts := read_prompts(config.evaluation):
            self._prompting = Prompting(config, tokenizer)
            self._prompts = {prompt: self._prompting.ids(prompt) for prompt in prompts}
            ends = text_ends(source).union(self._prompting.ends)
            most_new = config.evaluation.max_new_tokens
            self._manner = Manner(max_new_tokens=most_new, ends=tuple(ends))
            most = usable_positions(source.config, source.task)
            for prompt, ids in self._prompts.items():
                if len(ids) >= most:
                    raise ConfigError(
                        f"evaluation.prompts: {prompt[:40]!r}... has {len(ids)} tokens, the model "
                        f"takes {most - 1}"
                    )

    def __bool__(self) -> bool:
        return bool(self._prompts)

    def say(self, speak: Speak) -> list[tuple[str, str]]:
        """Return what a model says to each prompt."""
        return [
            (prompt, self._prompting.text(speak([ids], self._manner)[0]))
            for prompt, ids in self._prompts.items()
        ]
