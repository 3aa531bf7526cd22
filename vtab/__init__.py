"""VTAB-1k and its like: tasks, data, backbones, one training loop, one honest test."""

from export.cli import guard_imports

guard_imports()
