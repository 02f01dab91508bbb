"""`python -m rewrite` is the command line."""

from rewrite.cli.commands import main

if __name__ == "__main__":
    main()
