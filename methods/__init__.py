"""Other mathematics: each file can be deleted with its lines in build.py, kernels.py of runtime."""
