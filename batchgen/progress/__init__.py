"""How a run is shown while it is at work."""
