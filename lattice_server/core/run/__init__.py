"""A run's machine: its graph, its tasks and their states, its outputs. Rule: it knows no node, lease or clock."""
