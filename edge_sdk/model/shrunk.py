"""A narrow stand-in for a model: few blocks of every kind, in their order, of its own code.

What is right or wrong with the split of a model shows in it within a second, without weights. Knows
no model family: sizes are found by what transformers calls them, and a narrowing after which the
model no longer builds or runs is taken back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from edge_sdk.errors import ModelError
from edge_sdk.model.layout import Task, auto_class, build_empty, find_blocks

HIDDEN, HEADS, HEAD_DIM, INNER, VOCAB = 64, 4, 16, 96, 256
# Token ids above these are special ones, moved there; the check draws its own below.
FIRST_SPECIAL = 128
# Longest stretch of blocks that is kept where settings cannot be told block by block.
MOST_BLOCKS = 16

_COUNTS = re.compile(
    r"(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth"
    r"|num_blocks)"
)
# Settings that name a block at which something begins, and those that count from the end.
_THRESHOLDS = re.compile(
    r"(first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_(start|end)_index)"
)
_FROM_END = re.compile(r"(num_kv_shared_layers)")
_BLOCK_INDICES = re.compile(
    r"(mlp_only_layers|moe_layers|hybrid_layer_ids|full_attn_idxs|attn_layer_indices"
    r"|cross_attention_layers|attn_layers_idx)"
)

Narrowing = Callable[[str, int, Any], int]


def _heads(name: str, old: int, config: Any) -> int:
    """Keep one head one, all heads all, and grouped heads grouped."""
    if name == "num_heads" and getattr(config, "expand", None):
        return int(config.expand) * HIDDEN // HEAD_DIM
    if re.search(r"(key_value|kv|key)_?heads", name):
        queries = getattr(config, "num_attention_heads", None) or 0
        values = getattr(config, "linear_num_value_heads", None) or 0
        whole = values if name.startswith("linear") else queries
        if isinstance(whole, int) and old == whole:
            return min(old, HEADS)
        return min(old, HEADS // 2)
    return min(old, HEADS)


def _mamba_heads(_name: str, _old: int, config: Any) -> int:
    own = vars(config)
    expand = own.get("mamba_expand") or own.get("expand") or 2
    inner = 2 * HIDDEN if own.get("mamba_d_ssm") else int(expand * HIDDEN)
    widths = (own.get(n) for n in ("mamba_d_head", "mamba_headdim", "mamba_head_dim"))
    return inner // min(HEAD_DIM, *(w for w in widths if isinstance(w, int)), HEAD_DIM)


def _at_most(most: int) -> Narrowing:
    return lambda _name, old, _config: min(old, most)


def _positions(_name: str, old: int, config: Any) -> int:
    """Shorten a table of positions, and masks of that size; rotation has none."""
    is_rotated = any(name.startswith("rope_") for name in vars(config))
    return old if is_rotated else min(old, 128)


# By kind: which settings, and what they become. The first rule that fits a name counts.
_RULES: tuple[tuple[str, str, Narrowing], ...] = (
    ("ssm", r"(mamba_n_heads|mamba_num_heads|n_mamba_heads)", _mamba_heads),
    ("ssm", r"(mamba_d_head|mamba_headdim|mamba_head_dim)", _at_most(HEAD_DIM)),
    ("ssm", r"(mamba_d_state|state_size|ssm_state_size|.*chunk_size)", _at_most(16)),
    ("ssm", r"(mamba_d_ssm)", _at_most(2 * HIDDEN)),
    ("ssm", r"(mamba_dt_rank|time_step_rank)", _at_most(HIDDEN // 16)),
    ("ssm", r"(mamba_n_groups|mamba_ngroups|n_groups)", _at_most(2)),
    ("ssm", r"(lru_width)", _at_most(HIDDEN)),
    (
        "experts",
        r"(num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|topk)",
        _at_most(2),
    ),
    ("experts", r"(n_group|num_expert_group)", _at_most(2)),
    ("experts", r"(topk_group)", _at_most(1)),
    ("experts", r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", _at_most(4)),
    ("experts", r"(zero_expert_num)", _at_most(2)),
    (
        "heads",
        r"(swa_|linear_|index_|(en|de)coder_|num_(en|de)coder_|self_|cross_)?"
        r"(num_|n_)?(attention_|key_value_|kv_|key_|value_|query_)?(heads?|groups)"
        r"|num_attention_heads_per_layer|index_n_heads|swa_num_key_value_heads"
        r"|swa_num_attention_heads|linear_num_(key|value)_heads|num_query_groups",
        _heads,
    ),
    ("head_dim", r"global_head_dim", _at_most(2 * HEAD_DIM)),
    ("head_dim", r"qk_head_dim", _at_most(2 * HEAD_DIM)),
    (
        "head_dim",
        r"attention_hidden_size",
        lambda _n, old, c: min(
            old, HIDDEN * max(1, old // (getattr(c, "hidden_size", None) or old))
        ),
    ),
    (
        "head_dim",
        r"attention_head_dim",
        lambda _n, old, c: min(old, HEAD_DIM * (2 if hasattr(c, "attention_hidden_size") else 1)),
    ),
    (
        "head_dim",
        r"(.*head_dim|dim_head|kv_channels|d_kv|d_head|attention_head_size|rotary_dim)",
        _at_most(HEAD_DIM),
    ),
    ("ranks", r"(.*_rank|hc_lowrank|hidden_size_per_layer_input|d_rel)", _at_most(16)),
    (
        "hidden",
        r"(true_hidden_size|hidden_size|d_model|n_embd|dim|embedding_size|embedding_dim"
        r"|emb_dim|word_embed_proj_dim|pooler_hidden_size|input_embedding_size"
        r"|output_embedding_size|cross_attention_hidden_size|ple_embed_dim"
        r"|prediction_head_size|router_hidden_size|d_latents|entity_emb_size"
        r"|pronunciation_embed_dim|shape_embed_dim|output_hidden_size|embed_dim"
        r"|text_hidden_size|projection_dim)",
        _at_most(HIDDEN),
    ),
    (
        "inner",
        r"(.*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|.*ffn_hidden_size|d_inner|n_inner"
        r"|feed_forward_size|hidden_dim)",
        _at_most(INNER),
    ),
    (
        "windows",
        r"(sliding_window|sliding_window_size|attention_window_size|window_size"
        r"|local_attention|attention_window|attention_chunk_size|index_topk"
        r"|keep_window_size)",
        _at_most(4),
    ),
    ("positions", r"(max_position_embeddings|n_positions|n_ctx|max_seq_len)", _positions),
    ("vocabulary", r"(.*vocab_size.*|ngram_vocab_size_base|num_hash_buckets)", _at_most(VOCAB)),
)
_ORDER = (
    "vocabulary",
    "positions",
    "inner",
    "experts",
    "windows",
    "ranks",
    "ssm",
    "hidden+heads+head_dim",
)


def shrink(config: Any, task: Task) -> Any:
    """Return a copy of *config* that is narrow and has few blocks, one of each kind and more.

    Dropout and other noise are off. Special token ids are moved into the small vocabulary; equal
    ones stay equal.

    Raises:
        ModelError: transformers builds no model of *config* for *task*.
    """
    config = silenced(copy.deepcopy(config))
    text = _text_config(config)
    if task == "sequence-classification" and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = config.pad_token_id = 0
    every = [kind for kinds in _ORDER for kind in kinds.split("+")]
    for divisor in (0, 8):
        narrow = _fewer_blocks(_narrowed(config, every, divisor), task)
        if runs(narrow, task):
            return narrow
    small = _fewer_blocks(config, task)
    for kinds in _ORDER:
        candidate = _narrowed(small, kinds.split("+"))
        if runs(candidate, task, weightless=True):
            small = candidate
    return small


def shorten(config: Any, task: Task) -> tuple[Any, dict[int, int]]:
    """Return *config* with few blocks in their own width, and what they stand for.

    Returns:
        The config, and by the first of its blocks of each kind the number of those in the model.

    Raises:
        ModelError: transformers builds no model of *config* for *task*.
    """
    short = _fewer_blocks(config, task)
    kinds, found = _kinds_of(config, task), _kinds_of(short, task)
    return short, {found.index(kind): kinds.count(kind) for kind in sorted(set(found))}


def block_kinds(blocks: Sequence[nn.Module]) -> list[int]:
    """Return a number for each block: equal where the blocks differ in numbers only by index."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_signature(block), len(seen)) for block in blocks]


def _signature(block: nn.Module) -> tuple[Any, ...]:
    found = []
    for name, module in block.named_modules():
        settings = (
            (key, value if isinstance(value, str) else bool(value))
            for key, value in vars(module).items()
            if key[0] != "_"
            and (value is None or isinstance(value, bool | str))
            and not (isinstance(value, str) and re.search(r"\d", value))
        )
        own = [*module._parameters.items(), *module._buffers.items()]
        shapes = ((key, tuple(t.shape)) for key, t in own if t is not None)
        found.append((name, type(module).__name__, frozenset(settings), frozenset(shapes)))
    return tuple(found)


def configs_in(config: Any) -> Iterator[Any]:
    """Yield *config* and every configuration inside of it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs_in(value)


def _fewer_blocks(config: Any, task: Task) -> Any:
    """Return *config* with the fewest blocks that show all kinds of them and their sequences."""
    try:
        kinds = _kinds_of(config, task)
    except ModelError:
        total = getattr(_text_config(config), "num_hidden_layers", None) or 0
        return with_blocks(config, range(min(total, 4)), total)
    best, best_score = config, (-1, 0)
    for kept in _selections(kinds):
        candidate = with_blocks(config, kept, len(kinds))
        try:
            found = _kinds_of(candidate, task)
        except Exception:  # noqa: BLE001 - somebody else's model code may raise anything
            continue
        if len(found) != len(kept):
            continue
        if found == _relabelled([kinds[i] for i in kept]):
            return candidate
        score = (len(set(found)), -len(found))
        if score > best_score:
            best, best_score = candidate, score
    return best


def _kinds_of(config: Any, task: Task) -> list[int]:
    model = build_empty(config, task, torch.float32)
    blocks: Any = model.get_submodule(find_blocks(model))
    return block_kinds(list(blocks))


def _relabelled(kinds: Sequence[int]) -> list[int]:
    seen: dict[int, int] = {}
    return [seen.setdefault(kind, len(seen)) for kind in kinds]


def _selections(kinds: Sequence[int]) -> Iterator[list[int]]:
    """Yield choices of blocks that show all kinds and sequences of two, the shortest first."""
    total = len(kinds)
    kept, pairs = [0], set()
    for i in range(1, total):
        pair = (kinds[kept[-1]], kinds[i])
        if pair not in pairs:
            pairs.add(pair)
            kept.append(i)
    for i in range(1, total):
        if len(kept) >= 4:
            break
        if i not in kept:
            kept = sorted([*kept, i])
    yield kept
    steps = list(zip(kinds, kinds[1:], strict=False))
    enough = 1 + max((steps.index(step) + 1 for step in steps), default=0)
    for length in sorted({min(total, max(enough, 4)), min(total, enough + 1)}):
        yield list(range(length))
    for length in range(4, min(total, MOST_BLOCKS) + 1):
        yield list(range(length))


def with_blocks(config: Any, kept: Sequence[int], total: int) -> Any:
    """Return a copy of *config* that speaks of the blocks *kept* alone, of *total*."""
    config = copy.deepcopy(config)
    text = _text_config(config)
    for part in configs_in(config):
        overrides = _take_overrides(part)
        for name, value in list(vars(part).items()):
            new = value
            if part is not text:
                is_count = _COUNTS.fullmatch(name) and isinstance(value, int) and value > 2
                new = _first_two(part, name, 2) if is_count else value
            elif isinstance(value, list | tuple) and len(value) == total > 1:
                new = type(value)(value[i] for i in kept)
            elif _BLOCK_INDICES.fullmatch(name) and isinstance(value, list | tuple):
                new = type(value)(kept.index(i) for i in value if i in kept)
            elif isinstance(value, bool) or not isinstance(value, int):
                continue
            elif _COUNTS.fullmatch(name) and value == total:
                new = len(kept)
            elif _THRESHOLDS.fullmatch(name):
                new = sum(i < value for i in kept)
            elif _FROM_END.fullmatch(name):
                new = sum(i >= total - value for i in kept)
            if new is not value:
                setattr(part, name, new)
        if part is text and overrides:
            part.per_layer_config = {
                kept.index(i): own for i, own in overrides.items() if i in kept
            }
    return config


def _take_overrides(part: Any) -> dict[int, dict[str, Any]]:
    """Return the settings that single blocks of *part* have of their own, and forget them there."""
    if not getattr(part, "is_heterogeneous", False):
        return {}
    overrides = {int(i): dict(own) for i, own in part.to_dict()["per_layer_config"].items()}
    part.per_layer_config = None
    return overrides


def _first_two(part: Any, _name: str, count: int) -> int:
    """Cut the per-block lists of a tower beside the text model; returns its new block count."""
    old = next((v for n, v in vars(part).items() if _COUNTS.fullmatch(n)), None)
    for name, value in list(vars(part).items()):
        if isinstance(value, list | tuple) and len(value) == old:
            setattr(part, name, type(value)(value[:count]))
    return count


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:  # several: transformers cannot say which
        return config


def silenced(config: Any) -> Any:
    """Turn dropout and other noise of *config* off; returns it."""
    for part in configs_in(config):
        for name, value in list(vars(part).items()):
            noise = re.search(r"drop|jitter|noise", name)
            if noise and isinstance(value, float) and value:
                setattr(part, name, 0.0)
    return config


def _narrowed(config: Any, kinds: Sequence[str], divisor: int = 0) -> Any:
    """Return a copy of *config* in which the settings of *kinds* are small.

    With a *divisor* all widths of a head are divided by it: some of them are sums of others.
    """
    config = copy.deepcopy(config)
    rules = [(re.compile(pattern), rule) for kind, pattern, rule in _RULES if kind in kinds]
    if divisor:
        rules.insert(0, (re.compile(r".*head_dim"), lambda _name, old, _config: old // divisor))
    for part in configs_in(config):
        overrides = _take_overrides(part)
        before = copy.copy(part)
        for name, value in list(vars(part).items()):
            rule = next((rule for pattern, rule in rules if pattern.fullmatch(name)), None)
            if rule is not None and (new := _smaller(rule, name, value, before)) != value:
                setattr(part, name, new)
        if overrides:
            part.per_layer_config = _narrow_overrides(overrides, rules, before, divisor)
    if "vocabulary" in kinds:
        _move_special_ids(config)
    if "head_dim" in kinds:
        for part in configs_in(config):
            _narrow_rotation(part)
    return config


def _narrow_overrides(
    overrides: dict[int, dict[str, Any]],
    rules: Sequence[tuple[Any, Narrowing]],
    before: Any,
    divisor: int,
) -> dict[int, dict[str, Any]]:
    """Narrow what blocks have of their own; where it was larger than the others', it stays so."""
    for own in overrides.values():
        for name, value in own.items():
            rule = next((rule for pattern, rule in rules if pattern.fullmatch(name)), None)
            if rule is None or not isinstance(value, int):
                continue
            usual = vars(before).get(name) or value
            times = 1 if name.endswith("head_dim") and divisor else max(1, value // usual)
            own[name] = _smaller(rule, name, value, before) * times
    return overrides


def _smaller(rule: Narrowing, name: str, value: Any, config: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return rule(name, value, config) if value > 0 else value
    if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
        # Blocks of several widths keep several widths.
        several = sorted(set(value))
        sizes = {old: rule(name, old, config) for old in several}
        if len(set(sizes.values())) == 1:
            sizes = {old: min(old, sizes[old] * 2**i) for i, old in enumerate(several)}
        return type(value)(sizes[v] for v in value)
    return value


def _move_special_ids(config: Any) -> None:
    """Give special tokens ids in the small vocabulary; equal ones stay equal."""
    moved: dict[int, int] = {}

    def move(old: Any) -> Any:
        if isinstance(old, list | tuple):
            return type(old)(move(item) for item in old)
        if isinstance(old, bool) or not isinstance(old, int) or old < FIRST_SPECIAL:
            return old
        return moved.setdefault(old, VOCAB - 1 - len(moved) % (VOCAB - FIRST_SPECIAL))

    for part in configs_in(config):
        for name, value in list(vars(part).items()):
            if re.search(r"_token_(id|index)s?$|_id$|_ids$", name) and "layer" not in name:
                new = move(value)
                if new != value:
                    setattr(part, name, new)


def _narrow_rotation(part: Any) -> None:
    """Fit lists with an entry for each rotated pair of a head to the new width of a head."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(part, name, None)
        if not isinstance(settings, dict):
            continue
        for inner in (settings, *(v for v in settings.values() if isinstance(v, dict))):
            share = inner.get("partial_rotary_factor") or vars(part).get("partial_rotary_factor", 1)
            head = vars(part).get("head_dim") or HEAD_DIM
            pairs = int(head * (share or 1)) // 2
            for key in ("short_factor", "long_factor"):
                if isinstance(inner.get(key), list):
                    inner[key] = inner[key][:pairs]
            if isinstance(inner.get("mrope_section"), list):
                count = len(inner["mrope_section"])
                inner["mrope_section"] = [(pairs + i) // count for i in range(count)]


def runs(config: Any, task: Task, *, weightless: bool = False) -> bool:
    """Return whether the model of *config* can be built and answers to a few tokens."""
    factory = auto_class(config, task)
    config = copy.deepcopy(config)
    for part in configs_in(config):
        part.use_cache = False
    ids_BT = torch.arange(3, 13).view(2, 5)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            if weightless:
                with torch.device("meta"):
                    model = factory.from_config(config, trust_remote_code=False)
                    ids_BT = ids_BT.to("meta")
            else:
                model = factory.from_config(config, trust_remote_code=False)
            model.eval()(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT))
    except Exception:  # noqa: BLE001 - somebody else's model code may raise anything
        return False
    return True
