"""``mlxpref`` with the NumPy backend of ``fake_backend.py``, as a process that tests can kill."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fake_backend

from mlxpref import backends
from mlxpref.cli import main

if __name__ == "__main__":
    backends.get = lambda name="auto": fake_backend  # type: ignore[assignment]  # a stand-in for the room
    main(prog_name="mlxpref")
