# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests."""

import torch


# Tests run in two processes, and tiny models gain nothing from more threads.
torch.set_num_threads(1)
