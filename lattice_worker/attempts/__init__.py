"""Attempts on this node: a lease is prepared, runs on runners of the pool, and ends in one outcome for each attempt."""
