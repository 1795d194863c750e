"""The embedded model's world: its words, captions, scenes and their rendering."""
