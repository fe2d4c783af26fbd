"""Tests of `coordinator/rounds/plans`."""
