"""Matmuls of stored codes."""
