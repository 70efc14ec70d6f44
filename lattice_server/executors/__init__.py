"""The executors, which start worker processes on this machine or on nodes of Ray."""
