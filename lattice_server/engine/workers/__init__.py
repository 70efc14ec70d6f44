"""The sessions of workers: the messages to each, its reports, and the values on its node."""
