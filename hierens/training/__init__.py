"""Training: typed configs, data, schedules, checkpoints and the trainer."""
