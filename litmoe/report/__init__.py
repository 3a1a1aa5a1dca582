"""The report of a run: one HTML page with its curves, expert load, samples, settings and checkpoints."""
