"""``python -m compress``, and so ``torchrun -m compress``: the command."""

from compress_command import main

main()
