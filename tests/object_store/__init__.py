"""A real S3 server for tests (Ceph's RADOS Gateway on loopback) and a proxy that injects faults."""
