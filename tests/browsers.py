"""The browser that tests of pages drive: Debian's Chromium, or what CHROMIUM names."""

from __future__ import annotations

import os
import shutil

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
