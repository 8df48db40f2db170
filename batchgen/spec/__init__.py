"""The spec: its sections, its checks, and the table of tasks."""
