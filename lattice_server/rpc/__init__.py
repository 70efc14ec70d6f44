"""The only server code that sees grpc and protobuf."""
