"""Runnable examples."""

from export.cli import guard_imports

guard_imports()
