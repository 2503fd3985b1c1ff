"""Models for other programs: ONNX, OpenVINO's IR, and MONAI bundles."""
