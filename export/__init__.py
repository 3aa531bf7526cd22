"""Deployment: fold, export and check with PyTorch at hand; predict and verify with ONNX Runtime alone."""
