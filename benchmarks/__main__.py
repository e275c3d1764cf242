"""`make bench`: every table. Quality and copies need the images of LVD_SHARED or ../shared."""

import os
import sys
from pathlib import Path

from benchmarks import components, copies, memory, quality

ENCODER = "encoder/deit_tiny_patch16_224_fp16.safetensors"


def main() -> int:
    """The number of tables that miss their target."""
    shared = Path(os.environ.get("LVD_SHARED", "../shared"))
    missed = components.main([]) + memory.main([])
    if not (shared / "bench").is_dir():
        print(f"no labelled images at {shared}: the tables of quality and copies are left out")
        return missed
    missed += quality.main(["--bench", str(shared / "bench"), "--weights", str(shared / ENCODER)])
    return missed + copies.main(["--images", str(shared / "bench" / "pool")])


if __name__ == "__main__":
    sys.exit(main())
