"""Private rows to batches of tokens: reading, tokenising and batching, without torch."""

__all__ = [
    "batches",
    "chats",
    "encoding",
    "fast_tokenizer",
    "paths",
    "readers",
    "rows",
    "schemas",
    "tally",
    "templates",
    "tokenize",
]
