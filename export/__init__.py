"""Deployment: fold, export and check with PyTorch at hand; predict and verify with ONNX Runtime alone."""

from export.cli import guard_imports

guard_imports()
