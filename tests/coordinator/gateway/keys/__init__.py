"""Tests of `coordinator/gateway/keys`."""
