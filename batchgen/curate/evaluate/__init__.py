"""Compares a synthetic set with a real one, and measures whether it helps a classifier."""
