"""The model `small`: a vision tower and low-rank changes, trained beside a frozen language model."""
