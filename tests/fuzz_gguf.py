"""Damages GGUF files by their content: one that is whole is read, changed and written anew.

Knows the container, which keys llama.cpp reads, and which values are odd. Does not know which of them are accepted.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fuzz_values import TEXTS, odd_template, odd_text
from gguf_bytes import CODES, Tensor, gguf

from local_llava.gguf_file import TYPES, GGUFFile

INTEGERS = {f"u{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)}
INTEGERS |= {f"i{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)}

OPTIONAL_NAMES = {
    "general.": (
        "alignment file_type name quantization_version sampling.sequence sampling.temp sampling.top_k "
        "tensor_extra.name tensor_extra.prec_a4 type"
    ),
    "split.": "count no tensors.count",
    "adapter.": "lora.alpha type",
    "llama.": (
        "adapters.count attn_logit_softcapping classifier.output_labels classifier.pooling_type "
        "embedding_length_out embedding_length_per_layer_input embedding_scale expert_count "
        "expert_feed_forward_length expert_gating_func expert_shared_count expert_used_count "
        "expert_weights_scale features_length final_logit_softcapping full_attention_interval "
        "hidden_activation interleave_moe_layer_step leading_dense_block_count logit_scale n_deepstack_layers "
        "nextn_predict_layers num_loops pooling_type residual_scale ssm.conv_kernel target_layers "
        "tensor_data_layout token_shift_count use_parallel_residual vocab_size"
    ),
    "llama.attention.": (
        "causal clamp_kqv head_count_kv key_length key_length_swa layer_norm_epsilon max_alibi_bias "
        "output_scale recurrent_layers rope_pattern scale shared_kv_layers sliding_window "
        "sliding_window_pattern temperature_length temperature_scale value_length value_length_swa "
        "value_scale"
    ),
    "llama.rope.": (
        "dimension_count dimension_count_swa dimension_sections freq_base freq_base_swa scale_linear "
        "scaling.alpha scaling.attn_factor scaling.factor scaling.finetuned scaling.original_context_length "
        "scaling.type scaling.yarn_beta_fast scaling.yarn_ext_factor scaling.yarn_log_multiplier"
    ),
    "tokenizer.ggml.": (
        "add_bos_token add_eos_token add_sep_token add_space_prefix cls_token_id eom_token_id eot_token_id "
        "fim_pre_token_id fim_sep_token_id mask_token_id merges normalizer.lowercase normalizer.strip_accents "
        "padding_token_id pre precompiled_charsmap prefix_token_id remove_extra_whitespaces scores "
        "seperator_token_id suppress_tokens token_type_count unknown_token_id"
    ),
    "tokenizer.": "chat_template huggingface.json",
    "clip.": "has_audio_encoder projector_type use_gelu use_silu",
    "clip.vision.": (
        "block_count feature_layer image_grid_pinpoints is_deepstack_layers mm_patch_merge_type n_wa_pattern "
        "projector_type spatial_merge_size"
    ),
    "local_llava.": "pair_id",
    "local_llava.preprocess.": "mode resample rescale_factor shortest_edge",
    "local_llava.tokenizer.": "lstrip_tokens normalized_tokens rstrip_tokens space_prefix strip_space",
}
OPTIONAL_KEYS = [prefix + name for prefix, names in OPTIONAL_NAMES.items() for name in names.split()]
"""What llama.cpp (src/llama-arch.cpp of llama-cpp-python 0.3.36), its clip.cpp or local-llava may look for."""

_VECTORS = (
    "rope_freqs.weight output_norm.bias blk.0.attn_q.bias blk.0.attn_output.bias blk.0.ffn_down.bias "
    "blk.0.ffn_down.scale token_embd_norm.weight v.post_ln.weight v.patch_embd.bias mm.2.bias model.image_newline"
)
_MATRICES = (
    "output.weight blk.0.attn_qkv.weight blk.0.ffn_gate_inp.weight cls.weight v.blk.0.attn_qkv.weight mm.1.weight "
    "t.blk.0.attn_q.weight"
)
OPTIONAL_TENSORS = dict.fromkeys(_VECTORS.split(), 1) | dict.fromkeys(_MATRICES.split(), 2)
OPTIONAL_TENSORS["v.patch_embd.weight.1"] = 4
"""Name -> dimensions."""


@dataclass
class Doc:
    """The content of a file, to be changed and written anew."""

    entries: list[list[Any]]
    """Key, type, value."""
    tensors: list[Tensor]

    @classmethod
    def read(cls, path: Path) -> Doc:
        file = GGUFFile.open(path)
        data = path.read_bytes()
        tensors = [
            Tensor(t.name, list(t.shape[::-1]), data[t.offset : t.offset + t.nbytes], t.type)
            for t in file.tensors.values()
        ]
        return cls([[key, file.types[key], value] for key, value in file.metadata.items()], tensors)

    @property
    def bytes(self) -> bytes:
        alignment = next((v for k, t, v in self.entries if k == "general.alignment" and t == "u32"), 32)
        fine = 0 < alignment <= 1 << 16 and not alignment & (alignment - 1)
        return gguf([tuple(e) for e in self.entries], self.tensors, alignment if fine else 32)

    def value(self, key: str, default: Any = None) -> Any:
        return next((v for k, _, v in self.entries if k == key), default)

    def put(self, key: str, kind: str, value: Any) -> None:
        for entry in self.entries:
            if entry[0] == key:
                entry[1:] = kind, value
                return
        self.entries.append([key, kind, value])


Edit: TypeAlias = Callable[[Doc, random.Random], str]


def odd_value(kind: str, rng: random.Random, old: Any = None) -> Any:
    """A value of a type: extreme, or near the old one."""
    if kind.startswith("arr["):
        item = kind[4:-1]
        return [odd_value(item, rng) for _ in range(rng.choice((0, 1, 2, 3, 4, 16, 17, 1000)))]
    if kind == "str":
        return odd_text(rng, old if isinstance(old, str) else "")
    if kind == "bool":
        return rng.choice((True, False))
    if kind in ("f32", "f64"):
        near = [old * 2, old / 2, -old, old + 1e-3] if isinstance(old, float) and abs(old) < 1e30 else []
        return rng.choice((0.0, -0.0, 1.0, -1.0, 1e-12, 1e-5, 0.5, 1e12, 3e38, math.nan, math.inf, -math.inf, *near))
    low, high = INTEGERS[kind]
    near = [old - 1, old + 1, old * 2, old // 2, old + 256] if isinstance(old, int) else []
    values = (0, 1, 2, 3, 4, 8, 16, 17, 32, 64, 96, 128, 255, 256, 512, 640, 4096, 2**16, 2**27, low, high, high - 1)
    return rng.choice([v for v in (*values, *near, *near) if low <= v <= high])


def pick(doc: Doc, rng: random.Random, arrays: bool | None = None) -> list[Any]:
    """An entry; with `arrays`, one that is an array or one that is not."""
    fit = [e for e in doc.entries if arrays is None or e[1].startswith("arr") == arrays]
    if not fit:
        fit = doc.entries or [["general.name", "str", "x"]]
    return rng.choice(fit)


def change_value(doc: Doc, rng: random.Random) -> str:
    entry = pick(doc, rng, arrays=False)
    entry[2] = odd_value(entry[1], rng, entry[2])
    return f"{entry[0]} = {entry[2]!a:.60}"


def change_item(doc: Doc, rng: random.Random) -> str:
    entry = pick(doc, rng, arrays=True)
    if not entry[1].startswith("arr") or not entry[2]:
        return change_value(doc, rng)
    values = entry[2] = list(entry[2])
    i, j = rng.randrange(len(values)), rng.randrange(len(values))
    how = rng.choice(("odd", "odd", "odd", "drop", "twice", "swap", "shuffle", "sort", "empty", "cut", "copy"))
    match how:
        case "odd":
            values[i] = odd_value(entry[1][4:-1], rng, values[i])
        case "drop":
            del values[i]
        case "twice":
            values.insert(j, values[i])
        case "swap":
            values[i], values[j] = values[j], values[i]
        case "shuffle":
            rng.shuffle(values)
        case "sort":
            values.sort(key=repr)
        case "empty":
            values.clear()
        case "cut":
            del values[i:]
        case "copy":
            values[i] = values[j]
    return f"{entry[0]}[{i}] {how}"


def change_type(doc: Doc, rng: random.Random) -> str:
    entry = pick(doc, rng)
    kind = rng.choice(list(CODES))
    entry[1] = f"arr[{kind}]" if rng.random() < 0.3 else kind
    entry[2] = odd_value(entry[1], rng)
    return f"{entry[0]} becomes {entry[1]}"


def drop_entry(doc: Doc, rng: random.Random) -> str:
    entry = pick(doc, rng)
    doc.entries[:] = [e for e in doc.entries if e is not entry]
    return f"without {entry[0]}"


def repeat_entry(doc: Doc, rng: random.Random) -> str:
    entry = pick(doc, rng)
    value = entry[2] if rng.random() < 0.5 else odd_value(entry[1], rng)
    doc.entries.insert(rng.randrange(len(doc.entries) + 1), [entry[0], entry[1], value])
    return f"{entry[0]} twice"


def rename_key(doc: Doc, rng: random.Random) -> str:
    entry, old = pick(doc, rng), ""
    old, entry[0] = entry[0], rng.choice((odd_text(rng, entry[0]), pick(doc, rng)[0], "x" * 2000, rng.choice(TEXTS)))
    return f"{old} renamed to {entry[0]!a:.60}"


def swap_values(doc: Doc, rng: random.Random) -> str:
    one = pick(doc, rng)
    two = rng.choice([e for e in doc.entries if e[1] == one[1]] or [one])
    one[2], two[2] = two[2], one[2]
    return f"{one[0]} <-> {two[0]}"


def add_entry(doc: Doc, rng: random.Random) -> str:
    key, kind = (
        rng.choice(OPTIONAL_KEYS),
        rng.choice(("u32", "u32", "f32", "bool", "str", "i32", "arr[i32]", "arr[str]")),
    )
    if rng.random() < 0.2:
        kind = rng.choice(("arr[u32]", "arr[f32]", "arr[bool]", "u8", "u64", "f64", "i64"))
    doc.put(key, kind, odd_value(kind, rng, doc.value(key)))
    return f"{key} = {kind}"


def change_template(doc: Doc, rng: random.Random) -> str:
    key = "tokenizer.chat_template"
    doc.put(key, "str", odd_template(rng, doc.value(key, "{{ messages }}")))
    return key


def reorder(doc: Doc, rng: random.Random) -> str:
    rng.shuffle(doc.entries if rng.random() < 0.5 else doc.tensors)
    return "another order"


def a_tensor(doc: Doc, rng: random.Random) -> int:
    if not doc.tensors:
        doc.tensors.append(Tensor("x", [4], bytes(16)))
    return rng.randrange(len(doc.tensors))


def with_size(tensor: Tensor, rng: random.Random) -> Tensor:
    """The tensor with as many bytes as its type and shape need, so that the file is whole."""
    traits = TYPES.get(tensor.type)
    if traits is None or min(tensor.ne, default=0) < 1 or math.prod(tensor.ne) > 1 << 20:
        return tensor
    nbytes = -(-math.prod(tensor.ne) // traits.block) * traits.nbytes
    return dataclasses.replace(tensor, data=(tensor.data + rng.randbytes(max(0, nbytes - len(tensor.data))))[:nbytes])


def drop_tensor(doc: Doc, rng: random.Random) -> str:
    i = a_tensor(doc, rng)
    return f"without {doc.tensors.pop(i).name}"


def add_tensor(doc: Doc, rng: random.Random) -> str:
    name = rng.choice(sorted(OPTIONAL_TENSORS))
    sizes = (1, 2, 8, 16, 32, 48, 64, 96, 256)
    ne = [rng.choice(sizes) for _ in range(OPTIONAL_TENSORS[name])]
    tensor = Tensor(name, ne, b"", rng.choice((0, 0, 0, 1, rng.choice(sorted(TYPES)))))
    if rng.random() < 0.3:
        tensor = dataclasses.replace(doc.tensors[a_tensor(doc, rng)], name=name)
    doc.tensors.append(with_size(tensor, rng))
    return f"also {name} {ne}"


def rename_tensor(doc: Doc, rng: random.Random) -> str:
    i, j = a_tensor(doc, rng), a_tensor(doc, rng)
    one, two = doc.tensors[i], doc.tensors[j]
    if rng.random() < 0.4:
        doc.tensors[i], doc.tensors[j] = (dataclasses.replace(a, name=b.name) for a, b in ((one, two), (two, one)))
        return f"{one.name} <-> {two.name}"
    other_layer = re.sub(r"blk\.\d+", f"blk.{rng.choice((0, 1, 9, 2**31))}", one.name)
    name = rng.choice((two.name, other_layer, "x" * rng.choice((63, 64, 100)), "", "a\0b", "\n", "bad\udcff"))
    doc.tensors[i] = dataclasses.replace(one, name=name.encode(errors="surrogateescape"))  # type: ignore[arg-type]
    return f"{one.name} renamed to {name!a:.60}"


def retype_tensor(doc: Doc, rng: random.Random) -> str:
    i = a_tensor(doc, rng)
    kind = rng.choice(sorted(TYPES)) if rng.random() < 0.8 else rng.choice((4, 5, 31, 36, 43, 255, 2**31, 2**32 - 1))
    tensor = dataclasses.replace(doc.tensors[i], type=kind)
    doc.tensors[i] = tensor if rng.random() < 0.2 else with_size(tensor, rng)
    return f"{tensor.name} is of type {kind}"


def reshape(doc: Doc, rng: random.Random) -> str:
    i = a_tensor(doc, rng)
    ne = list(doc.tensors[i].ne)
    at = rng.randrange(len(ne)) if ne else 0
    how = rng.choice(("odd", "odd", "near", "reverse", "one more", "one less", "flat", "rotate"))
    match how:
        case "odd" if ne:
            ne[at] = rng.choice((0, 1, 2, 31, 255, 2**31, 2**32, 2**62, 2**63, 2**64 - 1))
        case "near" if ne:
            ne[at] = max(0, ne[at] + rng.choice((-32, -1, 1, 32, ne[at])))
        case "reverse":
            ne.reverse()
        case "one more":
            ne.insert(rng.choice((0, len(ne))), rng.choice((1, 1, 2)))
        case "one less":
            ne[at : at + 1] = []
        case "flat":
            ne = [math.prod(ne)]
        case "rotate":
            ne = ne[1:] + ne[:1]
    ne = [min(n, 2**64 - 1) for n in ne]
    tensor = dataclasses.replace(doc.tensors[i], ne=ne)
    doc.tensors[i] = tensor if rng.random() < 0.2 else with_size(tensor, rng)
    return f"{tensor.name} {how} {ne}"


def change_weights(doc: Doc, rng: random.Random) -> str:
    i = a_tensor(doc, rng)
    tensor = doc.tensors[i]
    pattern = rng.choice((b"\0", b"\xff", b"\x00\x00\xc0\x7f", b"\x00\x7c", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f"))
    data, start = bytearray(tensor.data), rng.choice((0, rng.randrange(len(tensor.data) + 1)))
    room = len(data) - start
    stop = start + rng.choice((room, min(room, 64)))
    new = (pattern * len(data))[: stop - start] if rng.random() < 0.7 else rng.randbytes(stop - start)
    data[start:stop] = new
    doc.tensors[i] = dataclasses.replace(tensor, data=bytes(data))
    return f"{tensor.name} bytes {start}:{stop} {new[:4].hex()}"


def move_tensor(doc: Doc, rng: random.Random) -> str:
    i = a_tensor(doc, rng)
    offset = rng.choice((0, 1, 31, 32, 64, 2**31, 2**32, 2**63 - 32, 2**63, 2**64 - 32, 2**64 - 1))
    doc.tensors[i] = dataclasses.replace(doc.tensors[i], offset=offset)
    return f"{doc.tensors[i].name} at {offset}"


def change_layers(doc: Doc, rng: random.Random) -> str:
    """A layer less or more, with its tensors, which is a whole model."""
    key = "llama.block_count" if doc.value("llama.block_count") else "clip.vision.block_count"
    n = doc.value(key)
    if type(n) is not int or not 1 <= n < 1000:
        return change_value(doc, rng)
    last = re.compile(rf"((?:v\.)?blk\.){n - 1}(\..*)")
    of_last = [(i, t, m) for i, t in enumerate(doc.tensors) if (m := last.fullmatch(str(t.name)))]
    if rng.random() < 0.5 and n > 1:
        doc.tensors[:] = [t for i, t in enumerate(doc.tensors) if i not in {i for i, _, _ in of_last}]
        doc.put(key, "u32", n - 1)
        return f"{n - 1} layers"
    doc.tensors += [dataclasses.replace(t, name=f"{m[1]}{n}{m[2]}") for _, t, m in of_last]
    doc.put(key, "u32", n + 1)
    return f"{n + 1} layers"


def change_vocabulary(doc: Doc, rng: random.Random) -> str:
    """Fewer or more tokens, in every array and matrix."""
    tokens = doc.value("tokenizer.ggml.tokens", [])
    change = rng.choice((-1, -5, -100, 1, 50))
    if not isinstance(tokens, list) or (n := len(tokens)) + change < 1:
        return change_value(doc, rng)
    for entry in doc.entries:
        if entry[0] in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
            new = {"arr[str]": "[new{}]", "arr[i32]": 1, "arr[f32]": -1.0}.get(entry[1])
            if new is None:
                continue
            more = [new.format(i) if isinstance(new, str) else new for i in range(max(0, change))]
            entry[2] = (list(entry[2]) + more)[: n + change]
    for i, tensor in enumerate(doc.tensors):
        if tensor.name in ("token_embd.weight", "output.weight"):
            doc.tensors[i] = with_size(dataclasses.replace(tensor, ne=[tensor.ne[0], n + change]), rng)
    return f"{n + change} tokens"


EDITS: dict[Edit, float] = {
    change_value: 10,
    change_item: 6,
    add_entry: 6,
    change_weights: 4,
    change_template: 2,
    swap_values: 2,
    drop_entry: 2,
    change_vocabulary: 2,
    change_layers: 1,
    reorder: 1,
    retype_tensor: 2,
    reshape: 2,
    add_tensor: 1,
    change_type: 1,
    repeat_entry: 0.3,
    rename_key: 0.5,
    drop_tensor: 0.5,
    rename_tensor: 0.7,
    move_tensor: 0.3,
}
"""Weights: what the container's rules refuse, they refuse soon."""


def edits(doc: Doc, rng: random.Random) -> Iterator[str]:
    """One to four edits, each with its name."""
    for edit in rng.choices([*EDITS], [*EDITS.values()], k=rng.choice((1, 1, 1, 1, 1, 2, 2, 3, 4))):
        yield f"{edit.__name__}: {edit(doc, rng)}"
