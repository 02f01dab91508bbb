"""The logical dimensions of a program: which axes of which tensors are one, and resizing them all together."""
