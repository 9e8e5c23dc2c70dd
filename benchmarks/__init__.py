"""Benchmarks of aiokeyless against what people would use instead: ``python -m benchmarks``."""
