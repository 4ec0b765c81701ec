# SPDX-License-Identifier: Apache-2.0
"""The paper's runs and its result tables, as data."""
