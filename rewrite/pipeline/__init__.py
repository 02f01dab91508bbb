"""What a pass is, how it is named, found and run."""
