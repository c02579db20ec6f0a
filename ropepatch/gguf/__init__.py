"""GGUF files for llama.cpp: the weights, the tokenizer, and a patch on the frequencies seam in llama.cpp's own words.

What is said of llama.cpp here was read in its sources (github.com/ggml-org/llama.cpp: src/llama-context.cpp,
src/llama-model.cpp, src/models/*.cpp, ggml/src/ggml-cpu/ops.cpp, conversion/*.py) and is held against a real llama.cpp
by scripts/check_llama_cpp.py.
"""
