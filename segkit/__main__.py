"""`python -m segkit` is the `segkit` command."""

from segkit.cli.main import main

if __name__ == "__main__":
    main()
