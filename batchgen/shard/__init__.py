"""Processes one shard, from its rows to its committed files."""
