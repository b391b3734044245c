"""What stands around the method: one file per command or optional engine. See refrag.py."""
