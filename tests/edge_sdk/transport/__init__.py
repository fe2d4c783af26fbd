"""Tests of `edge_sdk/transport`."""
