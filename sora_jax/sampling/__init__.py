"""The compiled sampler and its rules: numbers and a velocity, no network and no model file."""
