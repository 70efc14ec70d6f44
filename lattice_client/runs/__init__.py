"""Starts runs, follows them, and decodes their results."""
