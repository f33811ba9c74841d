"""`python -m workers` is the `dovecote` command."""

from workers.cli import main

if __name__ == "__main__":
    main()
