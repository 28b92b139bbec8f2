"""From a trained model to the files that other programs read."""
