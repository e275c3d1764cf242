"""`make bench`: prints every table that needs nothing but this repository."""

import sys

from benchmarks import memory

if __name__ == "__main__":
    sys.exit(memory.main([]))
