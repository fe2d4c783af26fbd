"""Tests of `coordinator/aggregation`."""
