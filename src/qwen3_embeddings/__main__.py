"""``python -m qwen3_embeddings``: the command line."""

import sys

from qwen3_embeddings.cli.main import main

sys.exit(main())
