"""Tests of `coordinator/lab/comparison/search`."""
