"""Plans a job: checks spec, input and model against each other, and maps rows to shards."""
