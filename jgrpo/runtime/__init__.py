# SPDX-License-Identifier: Apache-2.0
"""Everything with side effects: optimiser state, checkpoints, metrics on disk, the progress line."""
