"""The sessions of workers: what is sent to each, what each reports, and the values on its node."""
