"""The worker: one process per node that takes attempts over a stream and runs them apart from itself."""
