"""From a checkpoint to a Hugging Face folder, and back."""
