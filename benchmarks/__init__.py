"""Measurements that the documents quote, each a command that prints its table again."""
