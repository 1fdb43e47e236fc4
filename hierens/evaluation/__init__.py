"""What a model costs and how well it answers: profiles, metrics, pictures and tables."""
