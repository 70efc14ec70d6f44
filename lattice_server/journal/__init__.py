"""The journal: what was accepted and what happened to it, durable over the life of many servers."""
