"""Pure decisions: events and a time go in, effects come out. Standard library only."""
