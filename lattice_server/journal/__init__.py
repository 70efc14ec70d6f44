"""The journal: the durable log of all accepted work. See `engine/journal_port.py` for its protocol."""
