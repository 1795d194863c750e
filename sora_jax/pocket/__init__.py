"""The embedded model: its world of rendered clips, its training and its judge."""
