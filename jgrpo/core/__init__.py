# SPDX-License-Identifier: Apache-2.0
"""Pure functions of arrays: advantages, divergences, losses, log-probabilities. No config object, no I/O."""
