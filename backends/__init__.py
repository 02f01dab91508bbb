"""The built-in backends, one file per lowering, found through the entry points `rewrite.backends`."""
