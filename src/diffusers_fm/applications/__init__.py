# SPDX-License-Identifier: Apache-2.0
"""Uses of a velocity field: inverse problems, editing, anomaly detection and image quality, on torch alone."""
