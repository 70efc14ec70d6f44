"""The state of a process around the tasks that it runs: its environment, memory limit and children."""
