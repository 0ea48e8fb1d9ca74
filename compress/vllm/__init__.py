"""Let vLLM serve compressed checkpoints: the entry point ``vllm.general_plugins`` calls :func:`register` in each of its processes."""

import logging


def register() -> None:
    """Add the quantisation method ``compress`` to vLLM; a second call does nothing.

    Whatever goes wrong here would stop vLLM for models of all kinds, so it is logged and no more.
    """
    try:
        import compress.vllm.config  # noqa: F401  (registers on import, as a configuration may arrive pickled before this call)
    except Exception as error:
        logging.getLogger(__name__).warning("compress cannot serve its checkpoints in this vLLM: %s", error)
