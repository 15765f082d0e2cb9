"""Serving a bundle by NVIDIA's Triton Inference Server."""
