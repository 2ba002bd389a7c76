"""Tests in three levels: unit (formulas and small objects), integration (whole runs), distributed (several ranks)."""

import pytest

pytest.register_assert_rewrite("tests.support")
