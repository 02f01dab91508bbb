"""The built-in passes, one file per method, found through the entry points `rewrite.passes`."""
