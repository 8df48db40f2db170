"""The Ray Data graph that shards stream through, and what keeps its actors at work."""
