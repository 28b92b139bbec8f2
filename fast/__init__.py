"""The same numbers, sooner: each file's plain twin stands at the root."""
