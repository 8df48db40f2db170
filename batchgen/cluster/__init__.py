"""Ray as batchgen starts or joins it, and the jobs that are handed to a cluster."""
