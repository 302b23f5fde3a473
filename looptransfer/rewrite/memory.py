"""Which memory a tensor is, and which part of it."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from looptransfer.rewrite.graph import Part


@dataclass
class Memory:
    """A memory, and the node that wrote it last."""

    storage: Any  # kept alive, so that its key stays its own
    node: int
    parts: Any = None  # the node per element, where a part was written after the whole; numpy, which is not observed
    pieces: dict[Part, tuple[int, Part | None]] = field(default_factory=dict)  # of cat and stack: what each repeats


def key_of(tensor: Tensor) -> int:
    """A number for the memory of a tensor, its own while the memory is kept alive."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # inside vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return id(tensor) if has_no_memory(tensor) else int(tensor.untyped_storage()._cdata)


def has_no_memory(tensor: Tensor) -> bool:
    """A sparse tensor."""
    return tensor.layout is not torch.strided


def is_whole(tensor: Tensor) -> bool:
    """The tensor covers its memory."""
    return has_no_memory(tensor) or tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()


def part_of(tensor: Tensor) -> Part:
    """The part of its memory that a tensor is."""
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def region(parts: Any, tensor: Tensor) -> Any:
    """The elements of a memory that a tensor covers; all of them where it counts in another size."""
    if parts.size != tensor.untyped_storage().nbytes() // tensor.element_size():
        return parts
    strides = [stride * parts.itemsize for stride in tensor.stride()]
    return np.lib.stride_tricks.as_strided(parts[tensor.storage_offset() :], tensor.shape, strides)
