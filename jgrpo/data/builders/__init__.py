# SPDX-License-Identifier: Apache-2.0
"""Builders of the paper's data sets: from the downloads to ArrayRecord files of TFDS, without TensorFlow."""

from jgrpo.data.builders.build import build

__all__ = ["build"]
