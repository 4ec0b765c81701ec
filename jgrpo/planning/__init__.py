# SPDX-License-Identifier: Apache-2.0
"""What a run will need of a TPU slice, from its compiled programs, before the slice is there."""
