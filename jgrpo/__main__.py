# SPDX-License-Identifier: Apache-2.0
"""python -m jgrpo."""

import sys

from jgrpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
