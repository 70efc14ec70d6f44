"""One call of a user's function: its inputs, its surroundings, its questions and chunks, and its answer."""
