"""Measure a checkpoint: loss, lm-eval tasks, HellaSwag, expert statistics."""
