"""Tests of `coordinator/gateway`."""
