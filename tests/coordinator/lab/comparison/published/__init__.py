"""Tests of `coordinator/lab/comparison/statistics`."""
