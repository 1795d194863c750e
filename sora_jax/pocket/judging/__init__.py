"""The judge of the embedded model: what clips show, measured from pixels without any network."""
