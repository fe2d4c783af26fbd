"""Tests of `coordinator/onnx_export`."""
