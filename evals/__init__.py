"""Is it better now? Losses, scores and answers of a trained model."""
