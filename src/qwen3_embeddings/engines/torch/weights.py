"""Read the weights of a checkpoint from safetensors files."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qwen3_embeddings import checkpoint
from qwen3_embeddings.engines.torch.settings import Settings
from qwen3_embeddings.errors import UnknownModelError


@dataclass
class Weights:
    """Tensors of a checkpoint by name, without the prefix "model.".

    Args:
        model: hub id or folder, for messages.
        tensors: the tensors that were not taken yet.
    """

    model: str
    tensors: dict[str, torch.Tensor]

    def take(self, name: str, size: tuple[int | None, ...]) -> torch.Tensor:
        """Return a tensor and remove it here, so that the caller can free it.

        Args:
            name: its name.
            size: its shape; None for a dimension of any size.

        Raises:
            UnknownModelError: it is missing or has another size.
        """
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise UnknownModelError(
                f"the weights of {self.model!r} do not fit config.json: {name} is missing. "
                "Download the model again."
            )
        found = tuple(tensor.shape)
        if len(found) != len(size) or any(
            wanted not in {None, got} for wanted, got in zip(size, found, strict=True)
        ):
            raise UnknownModelError(
                f"the weights of {self.model!r} do not fit config.json: {name} has the size "
                f"{found}, not {size}. Download the model again."
            )
        return tensor


def read(name: str, settings: Settings) -> Weights:
    """Read all weights except an output head, which embedding does not use.

    Args:
        name: hub id or folder of the model.
        settings: device and precision of the tensors, and revision of the model.

    Raises:
        UnknownModelError: there is no such model, or a file is missing.
        ConfigurationError: there are no weights as safetensors.
    """
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for path in checkpoint.safetensors_files(name, settings.revision):
        with safe_open(str(path), framework="pt", device=str(settings.device)) as file:
            for key in file.keys():  # noqa: SIM118  (it is not a dict)
                if not key.startswith("lm_head."):
                    tensor = file.get_tensor(key)
                    tensors[key.removeprefix("model.")] = tensor.to(settings.dtype)
    return Weights(name, tensors)
