"""`python -m fivedp.cli` is `fivedp`."""

from __future__ import annotations

import sys

from fivedp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
