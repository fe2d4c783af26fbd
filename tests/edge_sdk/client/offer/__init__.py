"""Tests of `edge_sdk/client/offer`."""
