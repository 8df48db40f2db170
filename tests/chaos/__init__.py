"""Runs that are broken on purpose, with seeded faults, and checked from storage."""
