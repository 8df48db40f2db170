"""Starts or joins Ray, watches it during a run, and submits jobs to a cluster."""
