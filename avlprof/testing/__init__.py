"""Conformance tests that an author of a strategy inherits, and the models they run on."""
