"""Questions about a program that change nothing: norms, streams and branches, patterns, writes."""
