"""Tests of `edge_sdk/client/keeping`."""
