"""Conversion between Python values and the contract."""
