"""Packs a task's function: its pickle, and the user's own modules that the pickle needs."""
