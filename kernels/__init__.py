"""Triton kernels, installed as ``maskformer_fast.kernels``; they know nothing of the rest of the package."""
