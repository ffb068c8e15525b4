"""`python -m avfast SUBCOMMAND` is `avfast SUBCOMMAND`."""

from avfast.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
