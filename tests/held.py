"""`curate` in a process whose embed stage waits until it is let go on."""

import subprocess
import sys
from pathlib import Path

HELD = """
import sys, time
from pathlib import Path
from curation.cli import main
from curation.stages import embed
run = embed.run
def wait(*given):
    while not Path(sys.argv[1]).exists():
        time.sleep(0.05)
    return run(*given)
embed.run = wait
sys.exit(main(sys.argv[2:]))
"""


def held_run(recipe: Path, go: Path, output: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """`curate run RECIPE`, which embeds when the file `go` is there."""
    command = [sys.executable, "-c", HELD, str(go), "run", str(recipe), "--ray", "off"]
    return subprocess.Popen(command, stdout=output, stderr=output, text=True)
