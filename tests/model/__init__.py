"""Tests that load torch and tiny models in this process."""
