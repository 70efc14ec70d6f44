"""Stored workflows, and graphs that callers send in parts."""
