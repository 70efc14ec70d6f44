"""Makes runs again from the journal."""
