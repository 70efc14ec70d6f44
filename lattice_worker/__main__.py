"""`python -m lattice_worker`."""

from lattice_worker.cli import main

main()
