"""Where the ``compress`` command begins: its presence tells the library to import transformers only when it is needed."""


def main() -> None:
    """Run the command line."""
    from compress.cli import main as run

    run()
