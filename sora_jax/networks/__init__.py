"""The three networks and their parts: pure functions of arrays that read no file and know no sampler."""
