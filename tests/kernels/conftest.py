from __future__ import annotations

import os

# Triton reads the variable when it is imported, so these run in a process of their own: see test_interpreted.py.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
