"""Displays and logs the progress of a run."""
