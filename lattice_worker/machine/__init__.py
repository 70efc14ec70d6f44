"""This machine: its capacity, control group, memory and Ray node."""
