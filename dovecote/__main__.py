"""`python -m dovecote` and the `dovecote` command."""

from dovecote.processes.terminal import refuse


def main() -> None:
    """Run the command line, or say what is missing where only the library was installed."""
    try:
        from dovecote import cli

        cli.main()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("dovecote", "domain", "workers"):
            raise
        refuse(f"the command needs the package {error.name}: pip install 'dovecote[workers]'")


if __name__ == "__main__":
    main()
