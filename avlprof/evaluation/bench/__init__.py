"""Timings on random weights of real shapes, each way measured beside its alternatives."""
