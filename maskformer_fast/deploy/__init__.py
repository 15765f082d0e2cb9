"""A trained network outside PyTorch: ONNX graphs, TensorRT engines, compiled kernels, and the bundle that holds them.

Nothing here is imported with the package: a machine that runs a bundle needs NumPy and the backend's libraries only.
"""
