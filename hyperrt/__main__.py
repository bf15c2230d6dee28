"""`python -m hyperrt` is `hyperrt`."""

from __future__ import annotations

import sys

from hyperrt.cli.main import main

sys.exit(main())
