# SPDX-License-Identifier: Apache-2.0
"""The jitted programs of a run."""
