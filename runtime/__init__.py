"""What stands around the loop: plan, set-up, saving, resuming, reporting."""
