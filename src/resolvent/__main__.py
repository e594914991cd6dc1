"""`python -m resolvent` is `resolvent`."""

from resolvent.cli import main

if __name__ == "__main__":  # processes that a command starts import this file, too
    main()
