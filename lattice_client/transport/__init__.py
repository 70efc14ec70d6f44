"""Connections to a server: channels, calls, credentials, reconnection."""
