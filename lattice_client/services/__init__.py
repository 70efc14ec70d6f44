"""Services: their definition in Python, and the calls that start, list, scale and stop them."""
