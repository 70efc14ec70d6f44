"""What callers and the scheduler ask of runs: starts, added tasks, signals, retries, and the reports about tasks."""
