"""The web board without its script: runs as processes and files, and the page that shows them."""
