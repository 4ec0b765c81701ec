# SPDX-License-Identifier: Apache-2.0
"""Group Relative Policy Optimization of Granite Speech with a text metric as the reward, in JAX."""

__version__ = "0.2.0"
