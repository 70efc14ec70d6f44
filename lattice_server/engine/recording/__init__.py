"""What the engine writes to a journal, and when calls may rely on it."""
