"""The memory of each run: its record, events, chunks, references, secrets, and the runs by id."""
