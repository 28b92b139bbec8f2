"""From files to weights, and back."""
