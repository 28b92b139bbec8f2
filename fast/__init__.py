"""The same numbers, sooner: the plain twin stands at the root."""
