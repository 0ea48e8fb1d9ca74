"""Change the bits of a running engine: ``--worker-extension-cls compress.vllm.switching.BitsExtension`` adds this to its workers."""

from __future__ import annotations

from typing import Any

from compress.errors import CompressError
from compress.vllm.matrices import packed_parts, switch
from compress.vllm.settings import Settings, common_bits, held_bits


class BitsExtension:
    """Give every worker of vLLM calls to change its bits, between steps; vLLM makes this a base of its class."""

    def compress_bits(self) -> dict[str, Any]:
        """Return the bits in use, a mean where matrices differ, and the least and the most in memory."""
        quantization, parts = self._compressed()
        in_use = {name: part.bits for names, part in parts.items() for name in names}
        found = common_bits(in_use, quantization.shapes)
        spans = [part.shape.all_bits for names, part in parts.items() if names[0] != quantization.embedding]
        return {"bits": found, "held": [min(span[0] for span in spans), max(span[-1] for span in spans)]}

    def compress_set_bits(self, bits: Any) -> str | None:
        """Change the bits, to a number or a mean; return what is wrong with them, or None.

        What the engine keeps of earlier text was computed at the bits of that time.
        """
        quantization, parts = self._compressed()
        try:
            held = held_bits(quantization.folder, quantization.config, Settings(bits), quantization.access)
            least, most = self.compress_bits()["held"]
            if not least <= bits <= most:
                raise CompressError(
                    f"{bits} bits are not in memory, which has {least} to {most}; start the server with --held-bits."
                )
            switch(parts, {name: one.bits for name, one in held.items()})
        except CompressError as error:
            return str(error)
        return None

    def _compressed(self) -> tuple[Any, Any]:
        worker: Any = self
        return worker.vllm_config.quant_config, packed_parts(worker.get_model())
