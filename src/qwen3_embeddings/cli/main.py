"""The command line: ``qwen3-embeddings COMMAND``.

A command is a module with `add_parser`, which declares its options, and `run`, which runs it and
returns the exit code. An option has the name of the parameter it sets. The server's key is read
from QWEN3_EMBEDDINGS_API_KEY only, because other users of a machine can read its command lines.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from qwen3_embeddings import __version__
from qwen3_embeddings.cli import bench, doctor, embed, serve
from qwen3_embeddings.cli.demo import command as demo
from qwen3_embeddings.engines.vllm.compat import quiet
from qwen3_embeddings.errors import Qwen3EmbeddingsError

COMMANDS = (demo, doctor, serve, embed, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None for those of the process.

    Returns:
        0 on success, 1 after an error of this package (one line on stderr), 130 after Ctrl-C.
        Wrong usage exits with 2.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and "vllm_flags" not in arguments:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.vllm_flags = rest
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show Chinese
    quiet()
    try:
        code: int = arguments.run(arguments)
    except Qwen3EmbeddingsError as error:
        print(f"qwen3-embeddings: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3-embeddings",
        description="Qwen3-Embedding vectors from vLLM in this process or from a server.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    return parser
