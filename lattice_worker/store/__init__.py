"""The values and code of this node: files in shared memory or on disk that attempts read, write and send to others."""
