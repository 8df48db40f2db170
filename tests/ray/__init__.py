"""Tests that start Ray, batchgen or an S3 server."""
