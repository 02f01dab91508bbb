"""Passes that change how deep or how wide a network runs: layers in a row into layers side by side."""
