"""A rewritten model learns from the original what the rewriting cost it: values that correspond, least squares, training."""
