"""Timings on random weights of real shapes, each way measured beside its alternatives."""

from __future__ import annotations
