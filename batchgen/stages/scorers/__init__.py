"""Scores finished images; each scorer has its own file."""
