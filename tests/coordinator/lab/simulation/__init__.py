"""Tests of `coordinator/lab/simulation`."""
