"""Private rows to batches of tokens: reading, tokenising and batching, without torch.

Other packages import the modules that are named here, and no other.
"""

__all__ = ["batches", "fast_tokenizer", "readers", "rows", "tokenize"]
