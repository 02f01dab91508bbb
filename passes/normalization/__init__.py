"""Replace, place and fold normalization layers."""
