"""The checkpoint writer users test with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3_embeddings import ConfigurationError
from qwen3_embeddings.testing import SPECIAL_TOKENS, write_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_checkpoint_of_the_same_seed_in_another_process_has_the_same_bytes(tmp_path: Path) -> None:
    here = write_checkpoint(tmp_path / "here", seed=5)
    command = [sys.executable, "-m", "qwen3_embeddings.testing", str(tmp_path / "there")]
    done = subprocess.run([*command, "--seed", "5"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "there")
    assert contents(here) == contents(tmp_path / "there")
    other = write_checkpoint(tmp_path / "other", seed=6)
    assert contents(here)["model.safetensors"] != contents(other)["model.safetensors"]


@pytest.mark.engine
def test_tokenizer_has_the_layout_of_the_published_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_checkpoint(tmp_path / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert len(ids) == 26
    assert ids == list(range(ids[0], ids[0] + 26)), "one block behind the base vocabulary"
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert ids[-1] == vocabulary - 1
    assert tokenizer.pad_token_id == ids[0] != tokenizer.eos_token_id
    for text in ("", "hello", " \n\t", "中文 🙂", "in <|endoftext|> it", "e\u0301"):
        encoded = tokenizer(text)["input_ids"]
        assert encoded[-1] == ids[0]
        assert encoded.count(ids[0]) == 1 + text.count("<|endoftext|>")
    text = "def f(x):\n\treturn 'ünï' # 中文 🙂\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"][:-1]) == text


def test_write_checkpoint_with_wrong_sizes_is_refused(tmp_path: Path) -> None:
    for wrong in ({"dimensions": 48}, {"layers": 0}, {"vocabulary": 10}, {"context": 1}):
        with pytest.raises(ConfigurationError, match="multiple of 32"):
            write_checkpoint(tmp_path / "wrong", **wrong)
    assert not (tmp_path / "wrong").exists()


def test_checkpoint_with_another_preset_keeps_its_bytes(tmp_path: Path) -> None:
    here = write_checkpoint(tmp_path / "here")
    script = """
import sys
from qwen3_embeddings import prompts
more = prompts.Task("another", "Retrieve zebras, quokkas and axolotls")
prompts.TASKS = dict(prompts.TASKS) | {"another": more}
from qwen3_embeddings.testing import write_checkpoint
write_checkpoint(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "there")], check=True)
    assert contents(here) == contents(tmp_path / "there")


def test_write_checkpoint_to_the_home_folder_expands_the_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_checkpoint("~/tiny") == tmp_path / "tiny"
    assert (tmp_path / "tiny" / "config.json").is_file()
