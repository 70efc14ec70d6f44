"""The process that runs user code. Standard library and cloudpickle only: gRPC is never imported here."""
