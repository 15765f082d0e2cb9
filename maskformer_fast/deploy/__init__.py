"""A trained network outside PyTorch: ONNX graphs, TensorRT engines and compiled kernels in a bundle.

The package does not import this folder. A machine that runs a bundle needs NumPy and the backend's libraries only.
"""
