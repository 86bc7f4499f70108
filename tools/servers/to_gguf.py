"""Run llama.cpp's converter on a test checkpoint: ``to_gguf.py LLAMA_CPP CHECKPOINT OPTIONS``.

The converter knows a pre-tokenizer by a hash over the vocabulary's ids, which no made-up vocabulary
has. The test checkpoint's is Qwen's, so it is named here; everything else is the converter's own.
"""

import runpy
import sys

llama_cpp = sys.argv.pop(1)
sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]

from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
runpy.run_path(f"{llama_cpp}/convert_hf_to_gguf.py", run_name="__main__")
