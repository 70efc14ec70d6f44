"""Declares workflows: tasks, their inputs and outputs, their settings."""
