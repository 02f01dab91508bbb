"""The layer graph: programs, layers, regions, questions about nodes, generated code, fake values, the editor, history."""
