"""Making the parts of a bundle on a workstation: ONNX graphs, TensorRT engines, recorded and compiled kernels."""
