# SPDX-License-Identifier: Apache-2.0
"""Home of the Hugging Face libraries for these tests alone and all of their processes; imported before them."""

import atexit
import os
import shutil
import tempfile


MARK = "DIFFUSERS_FM_TESTS_HOME"

if MARK not in os.environ:
    os.environ[MARK] = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="diffusers-fm-tests-")
    for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        os.environ.pop(name, None)
    atexit.register(shutil.rmtree, os.environ[MARK], ignore_errors=True)
