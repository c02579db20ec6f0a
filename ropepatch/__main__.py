"""`python -m ropepatch` is the `ropepatch` command."""

from __future__ import annotations

from ropepatch.cli.app import main

if __name__ == "__main__":
    main()
