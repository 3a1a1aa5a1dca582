"""From settings to a checkpoint: LitGPT's pretraining with this project's loop in it."""
