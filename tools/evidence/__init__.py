"""What the project claims, measured on real models: traces, searches, comparisons and one page."""
