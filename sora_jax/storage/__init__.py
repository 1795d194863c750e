"""The model directory, the one weight format: written, read, verified, quantised."""
