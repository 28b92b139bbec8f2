"""The same numbers, on more cards: the twin is one process."""
