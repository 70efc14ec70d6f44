"""Threads, queues and time around the core. Knows neither grpc, protobuf nor Ray."""
