"""Out of the layer graph: to a backend, to plain outputs, back into the class of the user."""
