# SPDX-License-Identifier: Apache-2.0
"""Scores of a policy, and the tables of them."""
