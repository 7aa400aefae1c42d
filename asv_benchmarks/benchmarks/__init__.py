"""Benchmarks of fastseg, run by asv; see asv.conf.json."""
