"""The browser for tests of pages: Debian's Chromium, or the program in the variable CHROMIUM."""

from __future__ import annotations

import os
import shutil

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
