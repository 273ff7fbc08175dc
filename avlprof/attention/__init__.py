"""The registered attention function, row statistics and selection."""
