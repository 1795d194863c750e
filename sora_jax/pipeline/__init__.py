"""The stages put together: from settings and a model directory to a clip in a file."""
