"""The embedded model, trained from scratch: its builder, packing, optimiser, training and measured table."""
