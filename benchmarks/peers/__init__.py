"""Lattice beside other systems that run Python functions: `python -m benchmarks.peers`."""
