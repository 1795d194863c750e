"""The host side of a prompt: captions, token ids, sizes, reference frames; no JAX, no network."""
