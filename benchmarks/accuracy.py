#!/usr/bin/env python3
"""Exact answers of tiny-llava on fresh questions: transformers, local-llava at each type, stock llama-cpp-python.

    python benchmarks/accuracy.py --seed 12345 [--scenes 125]

The peer, llama-cpp-python's own chat handler (libmtmd), runs on the F32 files of local-llava with the very prompt that
the model was trained on, so that what differs is how image features are computed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import machine

from local_llava import Llava
from local_llava.convert import convert
from local_llava.types import KVType, ModelFiles

TINY = Path(__file__).parent.parent / "models" / "tiny-llava"
sys.path.insert(0, str(TINY))

PAIRS = (("F32", "F32"), ("F16", "F16"), ("Q8_0", "Q8_0"), ("Q6_K", "F16"), ("Q4_K_M", "F16"), ("Q4_K_M", "Q8_0"))
YES_NO = ("side", "exists")


@dataclass(frozen=True)
class Question:
    image: Path
    question: str
    answer: str
    kind: str


def read_questions(directory: Path, seed: int, scenes_count: int) -> list[Question]:
    import scenes

    lines = scenes.write(directory, seed, scenes_count).read_text().splitlines()
    return [Question(directory / q["image"], q["question"], q["answer"], q["kind"]) for q in map(json.loads, lines)]


def transformers_answers(questions: Iterable[Question]) -> list[str]:
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(TINY)
    answers = []
    for q in questions:
        content = [{"type": "image"}, {"type": "text", "text": q.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=Image.open(q.image), text=text, add_special_tokens=False, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    return answers


def our_answers(files: ModelFiles, questions: Iterable[Question], kv_type: KVType) -> list[str]:
    with Llava.load(files.model, files.mmproj, kv_type=kv_type) as llava:
        return [llava.ask(q.question, q.image, max_tokens=64).text for q in questions]


def stock_answers(files: ModelFiles, questions: Iterable[Question]) -> list[str]:
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Llava15ChatHandler

    class Handler(Llava15ChatHandler):
        DEFAULT_SYSTEM_MESSAGE = None
        CHAT_FORMAT = (
            "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
            "{% for c in m.content %}{% if c.type == 'image_url' %}{{ c.image_url.url }}\n{% endif %}{% endfor %}"
            "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}<|eot_id|>"
            # Jinja drops a newline at the very end of a template, hence the last "if".
            "{% endfor %}{% if true %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        )

    # libmtmd tells of every picture on stderr, past every switch.
    quiet, stderr = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(quiet, 2)
    handler = Handler(clip_model_path=str(files.mmproj), verbose=False)
    llama = Llama(str(files.model), chat_handler=handler, n_ctx=1024, verbose=False, logits_all=False)
    answers = []
    for q in questions:
        picture = {"type": "image_url", "image_url": {"url": q.image.resolve().as_uri()}}
        content = [picture, {"type": "text", "text": q.question}]
        reply = llama.create_chat_completion(
            [{"role": "user", "content": content}], max_tokens=64, temperature=0.0, repeat_penalty=1.0
        )
        answers.append(reply["choices"][0]["message"]["content"])
    os.dup2(stderr, 2)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True, help="seed of the scenes; any that you like")
    parser.add_argument("--scenes", type=int, default=125, help="scenes, with four questions each (default 125)")
    args = parser.parse_args()
    print(machine.describe())
    print(f"scenes.py --seed {args.seed} --count {args.scenes}")
    print(f"{'':36} {'all':>8} {'yes/no':>8}  same as transformers")
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        questions = read_questions(directory / "scenes", args.seed, args.scenes)
        reference = transformers_answers(questions)

        def report(name: str, answer: Callable[[], list[str]]) -> None:
            answers = answer()
            right = [a == q.answer for a, q in zip(answers, questions, strict=True)]
            yes_no = [r for r, q in zip(right, questions, strict=True) if q.kind in YES_NO]
            same = sum(a == b for a, b in zip(answers, reference, strict=True))
            share, share_yes_no = sum(right) / len(right), sum(yes_no) / max(1, len(yes_no))
            print(f"{name:36} {share:8.1%} {share_yes_no:8.1%}  {same} of {len(questions)}", flush=True)

        report("transformers F32", lambda: reference)
        files = {}
        for quant, mmproj in PAIRS:
            out = directory / f"{quant}-{mmproj}"
            files[quant, mmproj] = convert(TINY, out, quant=quant, mmproj_quant=mmproj)
            kv_type: KVType = "F32" if quant == "F32" else "F16"
            pair = files[quant, mmproj]
            report(f"local-llava {quant}, mmproj {mmproj}", lambda p=pair, k=kv_type: our_answers(p, questions, k))
        report("stock llama-cpp-python F32", lambda: stock_answers(files["F32", "F32"], questions))
        report("stock llama-cpp-python Q4_K_M", lambda: stock_answers(files["Q4_K_M", "F16"], questions))


if __name__ == "__main__":
    main()
