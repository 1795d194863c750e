"""The training of the embedded model's networks."""
