"""Parts of `lattice_worker.context`, which running tasks use. Rule: they run in the process of the task."""
