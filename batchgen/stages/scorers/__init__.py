"""Scores of finished images; each scorer is a file of its own."""
