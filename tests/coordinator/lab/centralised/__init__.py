"""Tests of `coordinator/lab/centralised`."""
