"""Services: the runs of their instances, the questions of these, and the timers of their machines."""
