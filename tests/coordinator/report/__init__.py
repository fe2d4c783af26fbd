"""Tests of `coordinator/report`."""
