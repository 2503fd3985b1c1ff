"""Engines that run a network on windows: PyTorch, OpenVINO, ONNX Runtime."""
