"""``python -m mlxpref`` is the command ``mlxpref``."""

from mlxpref.cli import main

if __name__ == "__main__":
    main(prog_name="mlxpref")
