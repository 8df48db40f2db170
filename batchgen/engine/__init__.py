"""The Ray Data graph that shards stream through, its actors, and their retries and watchdogs."""
