"""Tests of `coordinator/results/standing`."""
