"""Comparison of a converted network with recorded outputs of the official implementation."""
