"""Async invocations: attempts that share a process and an event loop, kept apart."""
