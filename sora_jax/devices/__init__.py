"""Where arrays lie and in which form they are computed, by platform: what a machine decides, not a network."""
