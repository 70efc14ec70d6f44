"""Instances of services: the task that starts a program, checks it, reports about it and stops it."""
