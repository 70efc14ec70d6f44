"""The worker protocol, both of its sides together."""
