"""Loads GGUF files in llama.cpp, each in a process of its own, and prints how it ended: "NAME loaded|refused|died N".

Run as `python load_ggufs.py FILE ...`. A model is also asked for the logits of a short text.
"""

from __future__ import annotations

import ctypes
import os
import sys

import llama_cpp as lib

TEXT = "Hello, world's end\n<|eot_id|> \u00e9\U0001f600".encode()


def load(path: str) -> bool:
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    if not model:
        return False
    vocab = lib.llama_model_get_vocab(model)
    tokens = (lib.llama_token * 256)()
    n = lib.llama_tokenize(vocab, TEXT, len(TEXT), tokens, 256, True, True)
    for i in range(lib.llama_vocab_n_tokens(vocab)):
        lib.llama_token_to_piece(vocab, i, ctypes.create_string_buffer(64), 64, 0, True)
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    context = lib.llama_init_from_model(model, params)
    return bool(context) and lib.llama_decode(context, lib.llama_batch_get_one(tokens, max(n, 0))) == 0


def main() -> None:
    for path in sys.argv[1:]:
        child = os.fork()
        if not child:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os._exit(0 if load(path) else 1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(path, {0: "loaded", 1: "refused"}.get(code, f"died {code}"))


if __name__ == "__main__":
    main()
