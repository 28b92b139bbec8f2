"""From files to token ids."""
