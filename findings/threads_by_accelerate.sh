#!/usr/bin/env bash
# accelerate 1.15.0, PartialState on CPUs: making it sets torch's number of threads, over the one that the program has chosen.
# Expected: an object that tells which process this is leaves torch's settings, or at least a number that was set with torch.set_num_threads.
# Seen: where a launcher has set RANK and WORLD_SIZE but not OMP_NUM_THREADS, the first PartialState (or Accelerator, or Trainer) calls
#   torch.set_num_threads with the physical cores over the local processes; it warns that OMP_NUM_THREADS is unset, not that a chosen number is
#   lost. torchrun sets OMP_NUM_THREADS for two processes and more; mpirun and Slurm do not.
# Matters: sums of floats depend on the number of threads, so a program that pins it to get the same bytes gets others, and only where it is launched so.
# Output:
#   plain: the number stays
#   launched: the number is that of the cores
#   launched, OMP_NUM_THREADS set: the number stays
set -euo pipefail
dir=$(mktemp -d); trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/env"
"$dir/env/bin/pip" install -qq --no-compile torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cat > "$dir/threads.py" <<'PYTHON'
import psutil
import torch
from accelerate import PartialState

cores = psutil.cpu_count(logical=False)
torch.set_num_threads(cores + 1)
PartialState(cpu=True)
print({cores: "the number is that of the cores", cores + 1: "the number stays"}.get(torch.get_num_threads(), "neither"))
PYTHON
unset OMP_NUM_THREADS
launched=(RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29517)
seen=$(
  echo "plain: $("$dir/env/bin/python" "$dir/threads.py")"
  echo "launched: $(env "${launched[@]}" "$dir/env/bin/python" -W ignore "$dir/threads.py")"
  echo "launched, OMP_NUM_THREADS set: $(env "${launched[@]}" OMP_NUM_THREADS=1 "$dir/env/bin/python" "$dir/threads.py")"
)
echo "$seen"
[ "$seen" = "plain: the number stays
launched: the number is that of the cores
launched, OMP_NUM_THREADS set: the number stays" ] || { echo "changed: PartialState no longer sets torch's threads as recorded here."; exit 1; }
