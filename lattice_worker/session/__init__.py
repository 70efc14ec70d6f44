"""What one stream to the server needs: the machine of the leases, and the messages that are due or unacknowledged."""
