"""The demo's images on S3, for a cluster to curate (deploy/demo.yaml).

python -m demo.upload s3://bucket/prefix
"""

import sys
import tempfile
from pathlib import Path

from curation.runtime.store import StoreError, open_store
from demo import images


def main(arguments: list[str]) -> int:
    """Makes the images and writes each below the prefix; returns the exit status."""
    if len(arguments) != 1 or not arguments[0].startswith("s3://"):
        print("demo.upload: say where: python -m demo.upload s3://bucket/prefix", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="lvd-") as folder:
        images.make(Path(folder))
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        try:
            store = open_store(arguments[0])
            for path in paths:
                store.write(path.relative_to(folder).as_posix(), path.read_bytes())
        except StoreError as error:
            print(f"demo.upload: {error}", file=sys.stderr)
            return 1
    print(f"{len(paths)} images at {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
