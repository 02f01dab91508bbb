"""Random pruning: masks whose positions are drawn."""
