"""Generate text and chat with trained models."""
