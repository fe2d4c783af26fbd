"""Tests of `edge_sdk/doctor`."""
