"""For plugin authors: test suites to inherit. Needs pytest, and pytest-asyncio (`katcore[test]`)."""

import pytest

# Before they are imported, or their assertions would fail without saying why.
pytest.register_assert_rewrite("katcore.testing.sandbox")
