"""Measurements that the documents quote, each a command that prints its table again."""

from export.cli import guard_imports

guard_imports()
