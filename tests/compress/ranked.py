"""Run recipes, a JSON object of output folders, in the processes that ``torchrun`` has started."""

import json
import sys
from pathlib import Path

import compress

for output, recipe in json.loads(Path(sys.argv[1]).read_text()).items():
    compress.run(recipe, output)
