"""The scheduler's machine: queued tasks, nodes, placement, leases. Rule: it knows tasks, never runs."""
