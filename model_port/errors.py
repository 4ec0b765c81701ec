# SPDX-License-Identifier: Apache-2.0
"""The one exception a person is meant to read."""


class UserError(ValueError):
    """A mistake in what the user gave: the message says what was given, what is allowed and what to do.

    The command line prints it without a traceback and exits with status 2.
    """
