"""Prometheus' own judge of metrics and rules, where Debian's package has brought it."""

import shutil

import pytest

PROMTOOL = shutil.which("promtool") or ""

needs_promtool = pytest.mark.skipif(not PROMTOOL, reason="promtool, of Debian's package prometheus, is not installed")
