"""Run ``compress run RECIPE -o FOLDER`` in the processes that ``torchrun`` has started, and kill one once some units are there."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from compress.cli import main


def die(folder: Path, units: int) -> None:
    """Wait until there are so many units, then be no more."""
    while len(list(folder.glob("*/*.safetensors"))) < units:
        time.sleep(0.001)
    Path(f"{folder}.killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)


recipe, output, rank, units = sys.argv[1:]
if os.environ["RANK"] == rank:
    threading.Thread(target=die, args=(Path(f"{output}.work"), int(units)), daemon=True).start()
sys.argv = ["compress", "run", recipe, "-o", output]
main()
