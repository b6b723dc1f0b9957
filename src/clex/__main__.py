"""`python -m clex`, the same as the command `clex`."""

from .cli import main

if __name__ == "__main__":
    main()
