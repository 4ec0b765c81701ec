# SPDX-License-Identifier: Apache-2.0
"""Between the device's samples and its update."""
