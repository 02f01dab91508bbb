"""The command line: commands, the job they share, what they print, progress."""
