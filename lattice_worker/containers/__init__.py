"""The isolation level `docker`: an image, a profile, and containers that each serve one lease."""
