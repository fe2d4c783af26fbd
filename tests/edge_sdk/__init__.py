"""Tests of edge_sdk, one file per source file."""
