"""From yaml files and the command line to one checked Config."""
