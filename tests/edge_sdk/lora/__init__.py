"""Tests of `edge_sdk/lora`."""
