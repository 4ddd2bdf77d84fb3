"""Lets the shared suite's asserts explain themselves."""

import pytest

pytest.register_assert_rewrite("model_suite", "store_suite")
