"""Tests of `coordinator/rounds/intake`."""
