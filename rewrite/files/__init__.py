"""Programs and weights on disk."""
