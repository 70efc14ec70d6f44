"""What the server keeps of each run: its record, events, chunks, references, secrets, and the runs by id."""
