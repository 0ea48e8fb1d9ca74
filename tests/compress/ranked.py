"""Run recipes, a JSON object of output folders, in the processes that ``torchrun`` has started.

With a rank and a number, that process is killed once so many units are there.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import compress
from compress.cli import main


def die(folder: Path, units: int) -> None:
    """Wait until there are so many units, then be no more."""
    while len(list(folder.glob("*/*.safetensors"))) < units:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


recipes = json.loads(Path(sys.argv[1]).read_text())
if len(sys.argv) > 2:
    (output,) = recipes
    rank, units = map(int, sys.argv[2:])
    if int(os.environ["RANK"]) == rank:
        threading.Thread(target=die, args=(Path(f"{output}.work"), units), daemon=True).start()
    recipe = Path(f"{output}.{os.environ['RANK']}.yaml")
    recipe.write_text(json.dumps(recipes[output]))
    sys.argv = ["compress", "run", str(recipe), "-o", output]
    main()
else:
    for output, recipe in recipes.items():
        compress.run(recipe, output)
