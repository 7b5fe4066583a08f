"""vLLM's own server, as its command `vllm serve` starts it.

The command itself asks for the version of a distribution called `vllm`, which the CPU build is not.
"""

from __future__ import annotations

import os

from galley_plugins import vllm_compat
from galley_plugins.worker import preloading


def main() -> None:
    vllm_compat.check_version()
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if os.environ.get(preloading.VARIABLE) == "1":
        preloading.start()
    cli_env_setup()
    arguments = make_arg_parser(FlexibleArgumentParser(prog="galley worker")).parse_args()
    configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    ServeSubcommand.cmd(arguments)


if __name__ == "__main__":
    main()
