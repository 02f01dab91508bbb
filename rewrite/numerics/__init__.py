"""Run two things and say how far apart they are: exact arithmetic, seeded randomness, comparison, probes."""
