"""The machine of services: how many instances there are, which get requests, and when they are replaced."""
