"""Fixtures shared by the tests."""

import pytest

try:
    from legacy1bit import math_ops
except ImportError:
    # The oracle's own tests need no package; a test that needs it imports it, and fails.
    math_ops = None


@pytest.fixture(params=math_ops.simd_levels() if math_ops else [])
def tier(request):
    """The name of an instruction set this CPU has, in use while the test runs."""
    former = math_ops.simd_level()
    math_ops.set_simd_level(request.param)
    yield request.param
    math_ops.set_simd_level(former)
