# SPDX-License-Identifier: Apache-2.0
"""From a data set to a batch, exact from any step."""
