"""Tests of `edge_sdk/model`."""
