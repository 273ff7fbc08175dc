"""The command line. Commands import what is heavy inside themselves, so that `--help` is quick."""

from __future__ import annotations

from avlprof.cli._app import main

__all__ = ["main"]
