"""Connections to a server: channels, calls, credentials, reconnection."""

import lattice_client.transport.grpc_import  # noqa: F401  # before any other import of gRPC
