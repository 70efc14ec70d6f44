"""The records of the engine for a journal, and the moment from which calls may rely on them."""
