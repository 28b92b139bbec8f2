"""Other mathematics: each file can be deleted together with its line in runtime/build.py."""
