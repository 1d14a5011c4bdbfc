# SPDX-License-Identifier: Apache-2.0
"""Figures of a trained flow: distances from data, likelihood, error by calls, straightness, memorisation."""
