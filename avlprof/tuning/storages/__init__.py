"""Where the trials of a study are: a journal in its folder, or PostgreSQL."""
