"""Function-preserving expansion: a larger model that computes the same."""
