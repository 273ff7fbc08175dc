"""What the project makes itself with; not part of the package."""
