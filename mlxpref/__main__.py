"""``python -m mlxpref`` is the command ``mlxpref``."""

import sys


def main() -> None:
    """The command; Ctrl-C while it is still being imported ends with 130, as later, and no traceback."""
    try:
        from mlxpref.cli import main as command

        command(prog_name="mlxpref")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
