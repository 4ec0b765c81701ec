# SPDX-License-Identifier: Apache-2.0
"""Config files with options after them, as most commands take them."""

import tyro

from jgrpo.config import load_config
from model_port.errors import UserError

CONFIG_HELP = """\
{summary}

CONFIG.py is a Python file whose get_config() returns {kinds}; configs/ has
examples. Every field of it is an option below. An option goes before what the file says;
what is marked required is set by the file.
"""

KINDS = {"RunConfig": "an SFTConfig or a GRPOConfig", "SFTConfig": "an SFTConfig", "GRPOConfig": "a GRPOConfig"}


def read_config(command: str, arguments: list[str], kind: type, summary: str):
    """Return the config of CONFIG.py and the options after it; in the place of a file, --help prints all options."""
    if any(argument in ("-h", "--help") for argument in arguments[:1]):
        description = CONFIG_HELP.format(summary=summary, kinds=KINDS[kind.__name__])
        tyro.cli(kind, args=["--help"], prog=f"jgrpo {command} CONFIG.py", description=description)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(f"the config file comes first: jgrpo {command} CONFIG.py [OPTIONS]; configs/ has examples")
    config = load_config(arguments[0])
    if not isinstance(config, kind):
        given = KINDS[type(config).__name__]
        raise UserError(f"{arguments[0]} returns {given}, and jgrpo {command} needs {KINDS[kind.__name__]}")
    return config, arguments[1:]


def override(config, arguments: list[str], *, prog: str):
    """Return the config with typed options applied; tyro reports an unknown option or a wrong type, and exits."""
    return tyro.cli(type(config), default=config, args=arguments, prog=prog)
