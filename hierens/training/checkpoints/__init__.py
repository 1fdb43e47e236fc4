"""What a run writes to go on from, and its models, whole or not at all."""
