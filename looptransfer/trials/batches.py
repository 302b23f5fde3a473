"""Batches, compared and hashed bit for bit: their tensors, arrays, numbers and words."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from looptransfer.rewrite.forward import tensors_held


def same_batch(first: Any, second: Any) -> bool:
    """Two batches hold the same tensors and arrays, bit for bit, and the same numbers and words."""
    pairs = itertools.zip_longest(_values(first), _values(second))
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bytes(a), _bytes(b))
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else type(a) is type(b) and a == b
        for a, b in pairs
    )


def digest(batches: Iterable[Any]) -> str:
    """Twelve characters that tell data apart, bit for bit; one batch is held at a time."""
    sha = hashlib.sha256()
    for value in itertools.chain.from_iterable(map(_values, batches)):
        described = (tuple(value.shape), str(value.dtype)) if isinstance(value, Tensor) else value
        sha.update(repr(described).encode())
        if isinstance(value, Tensor):
            sha.update(_bytes(value).cpu().numpy().tobytes())
    return sha.hexdigest()[:12]


def _values(batch: Any) -> Iterator[Any]:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, (int, float, str, bytes)):
            yield leaf
        elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
            yield (leaf.shape, leaf.dtype.str, leaf.tobytes())
        yield from (tensor for tensor in tensors_held(leaf) if tensor.layout == torch.strided)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)
