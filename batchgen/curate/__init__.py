"""Finished outputs: which of their samples to use, and one sample again."""
