"""Low-rank adapters on packed linears, which cannot take them into their weights (imports peft: import it late)."""

from typing import Any

from peft.tuners.lora import Linear

from compress.errors import CompressError
from compress.quant.linear import BitPlaneLinear


class PackedLora(Linear):
    """peft's own layer, which says why it cannot be merged."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to merge, unless the model has been dequantised since."""
        if isinstance(self.get_base_layer(), BitPlaneLinear):
            raise CompressError(
                "an adapter cannot be merged into packed weights: keep it beside the model, or call dequantize() on the model "
                "first, which makes its weights dense."
            )
        super().merge(*args, **kwargs)
