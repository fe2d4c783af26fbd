"""Tests of `coordinator/tracking`."""
