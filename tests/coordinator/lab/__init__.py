"""Tests of `coordinator/lab`."""
