"""Long tests: clusters, chaos, the launcher, the wheel."""
