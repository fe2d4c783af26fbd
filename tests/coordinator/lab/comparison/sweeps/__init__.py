"""Tests of `coordinator/lab/comparison/sweeps`."""
