"""Tests of `coordinator/results`."""
