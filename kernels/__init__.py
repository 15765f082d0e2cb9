"""Triton kernels, installed as ``maskformer_fast.kernels``; they import nothing else of the package."""
