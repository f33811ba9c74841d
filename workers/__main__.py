"""`python -m workers` and the `dovecote` command."""

import sys


def main() -> None:
    """Run the command line, or say what is missing where only `domain` was installed."""
    try:
        from workers import cli
    except ModuleNotFoundError as error:
        sys.stderr.write(f"dovecote: the command needs the package {error.name}: pip install 'dovecote[workers]'\n")
        raise SystemExit(2) from None
    cli.main()


if __name__ == "__main__":
    main()
