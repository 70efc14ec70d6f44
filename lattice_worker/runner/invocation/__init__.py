"""One call of a user's function: its inputs, what surrounds it, what it asks and streams, and its answer."""
