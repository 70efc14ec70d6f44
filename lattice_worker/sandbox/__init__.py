"""The isolation around an attempt."""
