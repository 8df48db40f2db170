"""Finished outputs: which of their samples to use."""
