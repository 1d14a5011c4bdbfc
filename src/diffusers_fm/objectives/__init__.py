# SPDX-License-Identifier: Apache-2.0
"""What the network learns: flow matching, flow maps, auxiliary losses, optimal transport, upscaling."""
