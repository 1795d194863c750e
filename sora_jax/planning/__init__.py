"""What a generation would take on hardware that is not here: its programs, compiled ahead of time for it."""
