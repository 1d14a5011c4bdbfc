# SPDX-License-Identifier: Apache-2.0
"""Training objectives: flow matching, flow maps, auxiliary losses, optimal transport, upscaling."""
