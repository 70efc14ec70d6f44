"""The way of a sandbox to the servers that its task may connect to: a proxy in a process of its own."""
