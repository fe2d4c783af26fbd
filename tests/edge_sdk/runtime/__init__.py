"""Tests of `edge_sdk/runtime`."""
