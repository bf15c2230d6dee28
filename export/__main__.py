"""`python -m export` is `hyperrt export`."""

import sys

from hyperrt.cli.main import run

if __name__ == "__main__":
    sys.exit(run(["export", *sys.argv[1:]]))
