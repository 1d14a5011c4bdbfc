# SPDX-License-Identifier: Apache-2.0
"""Silence while this package is imported: other libraries warn of optional packages that nobody asked for."""

import logging


_before = logging.root.manager.disable
logging.disable(logging.WARNING)


def restore() -> None:
    """Let warnings be heard again."""
    logging.disable(_before)
