"""Random inputs: a few, always the same, in every run of the tests; many others in a campaign."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

ANY_SPEED = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
SUITE = settings(
    derandomize=True, max_examples=60, deadline=None, database=None, suppress_health_check=ANY_SPEED
)
DEEP = settings(SUITE, derandomize=False, max_examples=3000, print_blob=True)

# A test takes `depth`, and decorates what must hold with it, above hypothesis' `given`.
depths = pytest.mark.parametrize(
    "depth", [SUITE, pytest.param(DEEP, marks=pytest.mark.campaign)], ids=["few", "many"]
)

sizes = st.tuples(st.integers(1, 13), st.integers(1, 13))  # (H, W)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """(H, W) bool."""
    height, width = draw(sizes)
    bits = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    return np.array(bits, bool).reshape(height, width)


numbers = (
    st.integers(-(10**6), 10**6)
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 1e300, -0.0])
)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=5)
# What JSON can hold.
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
