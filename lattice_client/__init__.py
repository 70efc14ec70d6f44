"""The Python client: declares workflows, runs them, reads what happens."""
