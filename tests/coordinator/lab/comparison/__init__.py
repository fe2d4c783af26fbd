"""Tests of `coordinator/lab/comparison`."""
