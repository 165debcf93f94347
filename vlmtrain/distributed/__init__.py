"""The processes of a run, their communication and their shutdown."""
