"""Read checkpoints whose matrices are stored in 8 or 4 bits as the dense models that they stand for, tensor by tensor.

Two forms are read, by the rules of transformers' own ``from_pretrained`` (``integrations/finegrained_fp8.py`` and ``integrations/mxfp4.py``):
float8 with a scale per block, as DeepSeek and Qwen publish, and MXFP4, as gpt-oss is published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from compress.errors import CompressError
from compress.weights import Checkpoint, TensorInfo

_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_UNREAD = ("activation_scale", "input_scale")  # of activations, which stay as they are
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FORMS = ("fp8", "mxfp4")
"""Values of ``quant_method`` that are read."""


class Dequantised(Checkpoint):
    """Offer the tensors of a folder as a dense checkpoint has them.

    ``dtype``, by its name, is what matrices become; ``block`` has the rows and columns of a block of float8. ``uneven`` names a
    matrix whose last blocks are smaller than the others, which transformers 5.24 takes for blocks of one size.
    """

    def __init__(self, files: Checkpoint, dtype: str, block: tuple[int, int]) -> None:
        self._below, self._dtype, self._block = files, dtype, block
        self.folder, self.files = files.folder, files.files
        self._parts: dict[str, tuple[str, str]] = {}  # matrix -> what it is stored as, and its scales
        stored = files.info()
        for name in stored:
            if name.endswith(_SCALE):
                self._parts[name.removesuffix(_SCALE)] = name.removesuffix(_SCALE), name
            elif name.endswith(_BLOCKS):
                whole = name.removesuffix(_BLOCKS)
                self._parts[whole] = name, whole + _SCALES
        for name, parts in self._parts.items():
            if missing := [part for part in parts if part not in stored]:
                raise CompressError(f"{files.folder}: {name} has no {missing[0]}; fetch the model again.")
        hidden = {part for parts in self._parts.values() for part in parts}
        self.uneven = next(
            (n for n, parts in self._parts.items() if self._is_uneven(*(stored[p].shape for p in parts))), None
        )
        self._info = {n: item for n, item in stored.items() if n not in hidden and not n.endswith(_UNREAD)}
        for name, item in self._info.items():
            if item.dtype in _FLOAT8:
                raise CompressError(
                    f"{files.folder}: {name} is in 8 bits and has no {name}{_SCALE}; fetch the model again."
                )
        size = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        for name, (values, _) in self._parts.items():
            item, shape = stored[values], stored[values].shape
            if values != name:  # [experts, rows, groups, bytes] -> [experts, columns, rows]
                shape = (*shape[:-3], 2 * shape[-2] * shape[-1], shape[-3])
            self._info[name] = replace(item, shape=shape, dtype=dtype, itemsize=size)

    def _is_uneven(self, values: tuple[int, ...], scales: tuple[int, ...]) -> bool:
        if len(scales) < 2 or len(values) != len(scales):
            return False
        sizes = zip(values[-2:], scales[-2:], self._block, strict=True)
        return any(-(-size // usual) == blocks > 1 and size % usual for size, blocks, usual in sizes)

    def info(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor of the dense model."""
        return self._info

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Copy some tensors, each dequantised by itself."""
        result, kind = dict[str, Tensor](), getattr(torch, self._dtype)
        for name in names:
            parts = self._parts.get(name, (name,))
            found = self._below.read(parts)
            values = found[parts[0]]
            if len(parts) == 1:
                result[name] = values
            elif parts[0] == name:
                result[name] = float8_matrix(name, values, found[parts[1]], self._block).to(kind)
            else:
                result[name] = float4_matrices(values, found[parts[1]], kind)
        return result

    def sha256(self) -> dict[str, str]:
        """Return the digest of every file that decides what the model is."""
        return self._below.sha256()


def float8_matrix(name: str, values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply every block of a matrix, float8 [..., N, K], by its scale, [..., blocks of rows, blocks of columns]: float32.

    The last blocks may be smaller. Where the scales are not those of ``block``, blocks are all of one size.
    """
    rows, columns = values.shape[-2:]
    down, across = scales.shape[-2:] if scales.ndim > 1 else (1, 1)
    high, wide = (_block(*sizes) for sizes in ((rows, down, block[0]), (columns, across, block[1])))
    if str(values.dtype).removeprefix("torch.") not in _FLOAT8 or not high or not wide:
        raise CompressError(
            f"{name}: {values.dtype} of {list(values.shape)} with scales of {list(scales.shape)} is no form that is read here."
        )
    factors = (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()
    spread = factors.reshape(*values.shape[:-2], down, across).repeat_interleave(high, -2).repeat_interleave(wide, -1)
    return values.float() * spread[..., :rows, :columns]


def _block(size: int, blocks: int, usual: int) -> int:
    """Return how large so many blocks of rows or columns are; 0 if nothing fits."""
    if -(-size // usual) == blocks:
        return usual
    return 0 if size % blocks else size // blocks


def float4_matrices(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Look up 4-bit floats, uint8 [E, N, groups, bytes], times powers of two, uint8 [E, N, groups]: [E, K, N] of a dtype."""
    table = torch.tensor(_FLOAT4, dtype=dtype)
    pairs = torch.stack([table[(values & 15).int()], table[(values >> 4).int()]], -1).flatten(-2)
    exponents = scales.int()[..., None] - 127
    return torch.ldexp(pairs, exponents).to(dtype).flatten(-2).transpose(-1, -2).contiguous()


def dense_files(files: Checkpoint, config: PretrainedConfig) -> Checkpoint:
    """Return the tensors of a dense model, whose config then says that it is one; refuse forms that are not read."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return files
    settings: Mapping[str, Any] = stored if isinstance(stored, Mapping) else stored.to_dict()
    method = str(settings.get("quant_method"))
    if method not in FORMS:
        raise CompressError(
            f"{files.folder}: is already quantised ({method}); compress starts from a dense model, or one stored as "
            f"{' or '.join(FORMS)}."
        )
    del config.quantization_config
    kind = getattr(config, "dtype", None) or torch.bfloat16
    rows, columns = settings.get("weight_block_size") or (128, 128)
    return Dequantised(files, str(kind).removeprefix("torch."), (rows, columns))
