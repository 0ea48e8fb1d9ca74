"""Where the ``compress`` command begins: its presence tells the library to import transformers only when it is needed."""

import gc


def main() -> None:
    """Run the command line."""
    # Importing torch and transformers makes a million objects that all stay: looking for garbage among them takes up to a fifth of that time.
    gc.set_threshold(100_000, 20, 20)
    from compress.cli import main as run

    run()
