"""What a run leaves in its folder, and what can be told and repeated from it."""
