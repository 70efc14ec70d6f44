"""Conversion between protobuf and the core's types. Rule: it checks form; the core checks meaning."""
