"""The command `lattice`."""
