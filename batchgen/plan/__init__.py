"""From spec and input to shards of samples, checked before any work."""
