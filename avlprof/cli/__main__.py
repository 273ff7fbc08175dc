"""`python -m avlprof.cli`: the command line without its script, as workers are started."""

from __future__ import annotations

from avlprof.cli.app import main

main()
