"""The embedded picture world: scenes drawn by code and questions about them."""
