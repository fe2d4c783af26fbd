"""What a machine keeps of models between two starts: parts, their hashes, and verdicts."""

__all__ = ["findings", "part_cache", "part_hashes", "split_proof"]
