"""Write compose.yaml: the flags of ``qwen3-embeddings serve`` for vLLM's own image.

    python integrations/vllm-server/generate.py > integrations/vllm-server/compose.yaml

The flags are those that ``serve`` would choose on a card of the given memory, so a change there
reaches the file by this command alone. `tests/test_deploy_vllm_server.py` holds that it did.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from unittest import mock

from memory import SMALL_CARD, vllm_bytes

from qwen3_embeddings.cli import serve
from qwen3_embeddings.engines.vllm.defaults import GIB, Device
from qwen3_embeddings.models import MODELS

IMAGE = "vllm/vllm-openai:v0.32.0"
API_SERVERS = 4
"""HTTP processes: what ``serve`` starts on a host of 12 cores."""


@dataclass(frozen=True)
class Variant:
    """One service of the file.

    Attributes:
        profile: Name of the Compose profile that starts it.
        model: Hub id.
        card: Memory of the smallest card for it, in GiB.
        flags: Further flags of ``serve``.
        small: True to limit context and steps as in `memory.SMALL_CARD`.
    """

    profile: str
    model: str
    card: int
    flags: tuple[str, ...] = ()
    small: bool = False

    @property
    def precision(self) -> str:
        """The weights' precision, as `memory` names it."""
        return "fp8" if "fp8" in self.flags else "bf16"


VARIANTS = (
    Variant("0.6b", "Qwen/Qwen3-Embedding-0.6B", 24),
    Variant("0.6b-8gb", "Qwen/Qwen3-Embedding-0.6B", 8, small=True),
    Variant("4b", "Qwen/Qwen3-Embedding-4B", 24),
    Variant("4b-fp8-12gb", "Qwen/Qwen3-Embedding-4B", 12, ("--quantization", "fp8"), small=True),
    Variant("8b", "Qwen/Qwen3-Embedding-8B", 48),
    Variant("8b-fp8", "Qwen/Qwen3-Embedding-8B", 24, ("--quantization", "fp8")),
)

HEADER = f"""\
# Written by generate.py: do not edit the flags here. Guide: docs/deploy-vllm-server.md.
#
#   cp env.example .env                     # set the key
#   docker compose --profile 0.6b up -d     # or another profile, see the services below
#   ./verify.sh
name: qwen3-embeddings

x-server: &server
  image: ${{VLLM_IMAGE:-{IMAGE}}}
  entrypoint: ["vllm", "serve"]
  environment: &environment
    # Clients send this key. It guards /v1 only, so the port is published on the loopback address.
    VLLM_API_KEY: ${{QWEN3_EMBEDDINGS_API_KEY:?set QWEN3_EMBEDDINGS_API_KEY in .env}}
    VLLM_NO_USAGE_STATS: "1"
    DO_NOT_TRACK: "1"
    HF_TOKEN: ${{HF_TOKEN:-}}
    HF_HUB_OFFLINE: ${{HF_HUB_OFFLINE:-0}} # 1 once the weights are in the volume
  ports: ["127.0.0.1:${{PORT:-8000}}:8000"]
  volumes: ["weights:/root/.cache/huggingface"]
  shm_size: 1gb # the server's processes exchange data through shared memory
  deploy:
    resources:
      reservations:
        devices: [{{driver: nvidia, count: 1, capabilities: [gpu]}}]
  healthcheck:
    test:
      - CMD
      - python3
      - -c
      - import urllib.request as u; u.urlopen("http://127.0.0.1:8000/health", timeout=5)
    interval: 15s
    timeout: 10s
    retries: 4
    start_period: 20m # the first start downloads up to 15 GB
  security_opt: ["no-new-privileges:true"]
  stop_grace_period: 30s
  restart: unless-stopped
  logging: {{driver: json-file, options: {{max-size: 20m, max-file: "3"}}}}

services:
"""
FOOTER = """
volumes:
  weights:
"""


def flags(variant: Variant) -> list[str]:
    """Return vLLM's flags for a variant as ``--name=value``, the model not among them."""
    words = [*variant.flags, "--host", "0.0.0.0", "--served-model-name", variant.model]
    if variant.small:
        cache = SMALL_CARD.cache_tokens * MODELS[variant.model].kv_bytes_per_token
        words += ["--max-model-len", str(SMALL_CARD.context)]
        words += ["--max-num-batched-tokens", str(SMALL_CARD.step_tokens)]
        words += ["--max-num-seqs", str(SMALL_CARD.step_texts)]
        words += ["--kv-cache-memory-bytes", str(cache)]
        need = vllm_bytes(MODELS[variant.model], variant.precision, SMALL_CARD)
        words += ["--gpu-memory-utilization", f"{need / (variant.card * GIB) + 0.05:.2f}"]
    parser = argparse.ArgumentParser()
    command = serve.add_parser(parser.add_subparsers(dest="command"))
    count = ["--api-server-count", str(API_SERVERS)]
    options, passed = command.parse_known_args(["--model", variant.model, *count, *words])
    options.vllm_flags = passed
    card = Device("gpu", variant.card * GIB)
    with mock.patch.object(serve, "this_device", return_value=card):
        return joined(serve.server_flags(options))


def joined(words: list[str]) -> list[str]:
    """Return ``--name value`` pairs as ``--name=value``."""
    pairs: list[str] = []
    for word in words:
        if word.startswith("--"):
            pairs.append(word)
        else:
            pairs[-1] += f"={word}"
    return pairs


def service(variant: Variant) -> str:
    """Return the YAML of a service."""
    lines = [f"  # {variant.card} GB of device memory and more."]
    lines += [f"  vllm-{variant.profile.replace('.', '-')}:", "    <<: *server"]
    lines += [f"    profiles: [{json.dumps(variant.profile)}]", "    command:"]
    lines += [f"      - {variant.model}"]
    for flag in flags(variant):
        quoted = "'" + flag.replace("'", "''") + "'" if set(flag) & set('{}[]":, ') else flag
        lines.append(f"      - {quoted}")
    return "\n".join(lines) + "\n"


def compose() -> str:
    """Return the whole file."""
    return HEADER + "\n".join(service(variant) for variant in VARIANTS) + FOOTER


if __name__ == "__main__":
    sys.stdout.write(compose())
