"""Batches, compared and hashed."""

import copy

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looptransfer.trials.batches import digest, same_batch
from looptransfer.trials.hooks import Batch

values = st.one_of(
    st.integers(),
    st.text(),
    st.lists(st.floats(width=32), max_size=3).map(torch.tensor),
    st.lists(st.floats(), max_size=3).map(np.array),
    st.booleans().map(lambda x: {"mask": torch.tensor(x)}),
)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.tuples(values, values))
def test_a_batch_is_the_same_as_its_copy_nan_included(batch: Batch) -> None:
    assert same_batch(batch, copy.deepcopy(batch))
    assert not same_batch(batch, (batch[0], torch.ones(7)))
    assert not same_batch(batch, (*batch, 1))
    assert digest([batch]) == digest([copy.deepcopy(batch)]) != digest([(batch[0], torch.ones(7))])
