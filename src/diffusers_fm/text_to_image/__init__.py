# SPDX-License-Identifier: Apache-2.0
"""Training of text-to-image pipelines: prompts, adapters, sizes and model cards."""
