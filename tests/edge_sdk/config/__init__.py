"""Tests of `edge_sdk/config`."""
