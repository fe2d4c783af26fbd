"""The models, slices and ways to compute of which benchmarks/memory.py measures the memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["float32", "bfloat16", "float16", "int8", "int4", "recompute", "onnxruntime"]
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 50256}
_LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model and one device's share of it."""

    name: str
    family: str
    settings: dict[str, Any]
    split: int
    targets: tuple[str, ...] = ("all-linear",)
    rank: int = 8
    rows: int = 4
    length: int = 128
    tail: bool = False
    residual: int = 0
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    kind: Kind = "float32"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the model's files."""

    @property
    def compute(self) -> str:
        """Dtype of matrix products."""
        return self.dtype if self.kind == self.dtype else "float32"


SMALL = Case(
    name="GPT-2-small, split 3 of 12, labels: server, 4 x 128, r = 8 everywhere, residual 8",
    family="gpt2",
    settings=_GPT2,
    split=3,
    residual=8,
)
LLAMA = Case(
    name="Llama shape (1024 / 2816, grouped heads), split 6 of 8, 2 x 256, r = 16 everywhere",
    family="llama",
    settings=_LLAMA,
    split=6,
    rank=16,
    rows=2,
    length=256,
)
BERT = Case(
    name="BERT shape with its dropout, k = L = 6, classifier, 8 x 128, r = 8 on query, value",
    family="bert",
    settings={"num_hidden_layers": 6, "num_labels": 2},
    split=6,
    targets=("query", "value"),
    rows=8,
    tail=True,
    task="sequence-classification",
)
WHOLE = Case(
    name="GPT-2 shape, k = L = 4, 4 x 128, r = 4 on c_attn",
    family="gpt2",
    settings={**_GPT2, "n_layer": 4},
    split=4,
    targets=("c_attn",),
    rank=4,
    tail=True,
)
TAIL = replace(
    WHOLE, name="GPT-2 shape, split 2 of 4, labels: device, 4 x 128, r = 4 on c_attn", split=2
)
WIDE = Case(
    name="GPT-2-small, split 2 of 12, 8 x 384, r = 8 everywhere: tensors beyond the heap",
    family="gpt2",
    settings=_GPT2,
    split=2,
    rows=8,
    length=384,
)
ON_LLAMA: tuple[tuple[Kind, str], ...] = (
    ("int8", "base in int8"),
    ("int4", "base in int4"),
    ("recompute", "recomputed during the backward pass"),
    ("onnxruntime", "on onnxruntime"),
)
ON_SMALL: tuple[Kind, ...] = ("int8", "int4", "recompute", "onnxruntime")

CASES = (
    SMALL,
    LLAMA,
    BERT,
    WHOLE,
    TAIL,
    WIDE,
    replace(
        LLAMA,
        name="the Llama shape with base and computation in bfloat16",
        kind="bfloat16",
        dtype="bfloat16",
    ),
    *(replace(LLAMA, name=f"the Llama shape, {text}", kind=kind) for kind, text in ON_LLAMA),
    *(
        replace(SMALL, name=f"GPT-2-small, split 3, 4 x 128, r = 8: {kind}", kind=kind)
        for kind in ON_SMALL
    ),
    # Few tokens: a CPU multiplies float16 very slowly.
    replace(
        SMALL,
        name="GPT-2-small, split 3, 1 x 16, base and computation in float16",
        residual=0,
        rows=1,
        length=16,
        kind="float16",
        dtype="float16",
    ),
    replace(
        TAIL,
        name="GPT-2 shape, split 2 of 4, labels: device: onnxruntime",
        kind="onnxruntime",
    ),
    replace(
        WIDE,
        name="GPT-2-small, split 2 of 12, 8 x 384, r = 8 everywhere: onnxruntime",
        kind="onnxruntime",
    ),
)
