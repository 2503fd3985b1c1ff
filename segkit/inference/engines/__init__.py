"""What runs a network on windows: PyTorch, OpenVINO, ONNX Runtime."""
