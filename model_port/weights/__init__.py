# SPDX-License-Identifier: Apache-2.0
"""How the weights are stored: Hugging Face and Orbax directories, and the way between them."""
