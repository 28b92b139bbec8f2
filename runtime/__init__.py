"""What stands around the loop: settings, plan, saving, resuming, reporting."""
