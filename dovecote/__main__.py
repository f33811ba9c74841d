"""`python -m workers` and the `dovecote` command."""

import sys

from dovecote.processes.terminal import write_line


def main() -> None:
    """Run the command line, or say what is missing where only `domain` was installed."""
    try:
        from dovecote import cli
    except ModuleNotFoundError as error:
        sentence = f"the command needs the package {error.name}: pip install 'dovecote[workers]'"
        write_line(sys.stderr, sentence, before="dovecote: ")
        raise SystemExit(2) from None
    cli.main()


if __name__ == "__main__":
    main()
