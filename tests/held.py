"""`curate` in a process whose embed stage waits until it is let go on, and may take its time."""

import subprocess
import sys
from pathlib import Path

HELD = """
import sys, time
from pathlib import Path
from curation.cli import main
from curation.stages import embed
run, part = embed.run, embed.EmbedWorker.__call__
def wait(*given):
    while not Path(sys.argv[1]).exists():
        time.sleep(0.05)
    return run(*given)
def slowly(*given):
    time.sleep(float(sys.argv[2]))
    return part(*given)
embed.run, embed.EmbedWorker.__call__ = wait, slowly
sys.exit(main(sys.argv[3:]))
"""


def held_run(
    recipe: Path, go: Path, output: int = subprocess.PIPE, pause_s: float = 0
) -> subprocess.Popen[str]:
    """`curate run RECIPE`, which embeds when the file `go` is there, with a pause at each part."""
    command = [sys.executable, "-c", HELD, str(go), str(pause_s)]
    command += ["run", str(recipe), "--ray", "off"]
    return subprocess.Popen(command, stdout=output, stderr=output, text=True)
