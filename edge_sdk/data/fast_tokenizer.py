"""The tokenizer of a device without transformers: `tokenizer.json` by the `tokenizers` package.

Answers what `tokenize.py` asks of a transformers tokenizer, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_sdk.errors import ModelError, one_line

MISSING = "the onnxruntime backend needs it: save the model's tokenizer with `save_pretrained`"


class PlainTokenizer:
    """A fast tokenizer and what is known of its special tokens."""

    def __init__(self, folder: Path) -> None:
        """Read the tokenizer that lies in *folder*.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{folder} has no tokenizer.json; {MISSING}")
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - tokenizers raises plain Exception
            raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        settings = {**_read(folder / "special_tokens_map.json")}
        settings |= _read(folder / "tokenizer_config.json")
        if isinstance(more := settings.get("extra_special_tokens"), dict):
            settings = {**more, **settings}
        self._special = {
            name: text
            for name, value in settings.items()
            if name.endswith("_token") and (text := _text(value)) is not None
        }
        self.chat_template = _template(folder, settings)
        self.is_fast = True

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def _id(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by their names."""
        return self._special

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text, as it is written; None without one."""
        return self._special.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None without one."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None without one."""
        return self._id("eos_token")

    @property
    def all_special_ids(self) -> list[int]:
        """Every special token that is known by name."""
        return [found for name in self._special if (found := self._id(name)) is not None]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_offsets_mapping: bool = False,
        **_ignored: object,
    ) -> dict[str, Any]:
        """Return the ids of one text or of several, as `input_ids`.

        With them, if asked, which letters each of them stands for, as `offset_mapping`.
        """
        if truncation and max_length is not None:
            self._tokenizer.enable_truncation(max_length)
        try:
            if isinstance(text, str):
                ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
                return {"input_ids": ids}
            rust = self._tokenizer
            is_short = not return_offsets_mapping and hasattr(rust, "encode_batch_fast")
            encode = rust.encode_batch_fast if is_short else rust.encode_batch
            found = encode(list(text), add_special_tokens=add_special_tokens)
            answer = {"input_ids": [encoding.ids for encoding in found]}
            if return_offsets_mapping:
                answer["offset_mapping"] = [encoding.offsets for encoding in found]
            return answer
        finally:
            self._tokenizer.no_truncation()

    def decode(self, ids: Sequence[int], **_ignored: object) -> str:
        """Return what *ids* stand for, special tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from error
    return found


def _text(value: Any) -> str | None:
    """Return a token as it is written, whether it stands alone or with its settings."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    own = folder / "chat_template.jinja"
    if own.is_file():
        others = (folder / "additional_chat_templates").glob("*.jinja")
        named = {path.stem: path.read_text("utf-8") for path in sorted(others)}
        default = own.read_text("utf-8")
        return {"default": default, **named} if named else default
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        return {entry["name"]: entry["template"] for entry in found}
    return found
