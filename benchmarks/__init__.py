"""Benchmarks of aiokeyless against what users would write instead: ``python -m benchmarks``."""
