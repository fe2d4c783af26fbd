"""Tests of `coordinator/lab/privacy`."""
