"""Export a checkpoint to a Hugging Face folder, and import such a folder."""
