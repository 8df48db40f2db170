"""Reads, writes and checks outputs: their records, leases and formats, and finished ones."""
