"""`python -m avlprof`: the command line, for launchers that start modules."""

from avlprof.cli import main

if __name__ == "__main__":
    main()
