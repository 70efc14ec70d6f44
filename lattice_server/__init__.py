"""The Lattice server: keeps workflows and runs, schedules attempts onto workers, streams what happens."""

__version__ = "0.1.0"
