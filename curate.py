"""What `ray job submit --working-dir . -- python curate.py run recipe.yaml` runs."""

import sys

from curation.cli import main

if __name__ == "__main__":
    sys.exit(main())
