"""Tests of `coordinator/scores`."""
