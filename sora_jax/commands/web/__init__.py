"""The local page of ``sora-jax page``: requests, one computation at a time, and what the browser shows."""
