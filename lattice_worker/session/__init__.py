"""One session with the server: the machine of its leases, and the messages that are due or unacknowledged."""
