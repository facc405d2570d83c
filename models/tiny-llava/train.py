#!/usr/bin/env python3
"""Train tiny-llava from nothing, on the CPU, and save it the way transformers saves LLaVA.

Knows the model's sizes, its tokenizer, and the recipe; the world it learns is in `scenes.py`. In stages:

- *tower.* The CLIP tower learns to see. Where CLIP has captions from the web, we know every pixel, so small linear
  heads on the patches of the feature layer read off what stands there, and heads on the pooled class token read off
  what the scene holds. The heads are thrown away in the end.
- *llava.* Tower, projector and decoder learn the answers to questions together, each token counting the same.
- *answers.* Each answer counts the same, however short, and the tower moves less.
- *lookup.* Questions that must find a thing by what it looks like ("What colour is the circle?", "Is there ...?") are
  the hardest: nothing rewards the search while nothing uses what it finds. So, in this stage, more of them are asked;
  the projected patches are drawn towards the words for what they show; and heads on the decoder's middle layers read
  off, at each colour or shape word of a question, the things that it means. These heads are thrown away, too.
- *sides.* "Is the red star to the left of the blue square?" compares two things; it is asked in half of the questions,
  and at the second thing's name heads read off where the first one stands, which side is asked for, and the answer. The
  learning rate goes down to the end.

    python train.py --work /tmp/tiny-llava        # checkpoints go to --work; run again to go on after a stop
    python train.py --work /tmp/tiny-llava --save # writes the model beside this script

Several questions about a scene share one row: an attention mask lets each see the picture and itself only, so that
the picture's tokens are computed once. One row in five is a conversation instead, in which later turns see earlier
ones.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scenes
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from local_llava.convert.chat_template import LLAMA3_CHAT

HERE = Path(__file__).parent
SEED = 20261122
IMAGE_SIZE, PATCH_SIZE = 96, 16
GRID = IMAGE_SIZE // PATCH_SIZE
N_PATCHES = GRID * GRID
FEATURE_LAYER = -2
VOCAB_ROWS = 640
"""Rows of the embedding: more than the tokenizer has entries, as in the real Llama-3 LLaVA."""

SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<pad>",
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama-3's pre-tokenizer, its merges learnt from the questions and answers of 2,000 scenes."""
    bpe = Tokenizer(models.BPE(ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    texts: list[str] = ["system", "user", "assistant", "\n\n"] * 500
    for _, (scene, rng) in zip(range(2000), scenes.sample_scenes(f"vocabulary {SEED}", held_out=False), strict=False):
        for q in scenes.sample_questions(scene, rng, 9):
            texts += [q.question, q.answer, q.question.lower()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_ROWS - 32,
        min_frequency=20,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    bos = SPECIALS[0]
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token="<|eot_id|>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=1024,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP's preprocessing at this model's size, and the Llama-3 chat format with the picture before the text."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=LLAMA3_CHAT,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model, float32."""
    token = tokenizer.convert_tokens_to_ids
    text = LlamaConfig(
        vocab_size=VOCAB_ROWS,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=token("<|begin_of_text|>"),
        eos_token_id=token("<|end_of_text|>"),
        pad_token_id=token("<pad>"),
    )
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_act="quick_gelu",
        projection_dim=256,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token("<image>"),
        projector_hidden_act="gelu",
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=N_PATCHES,
    )
    return LlavaForConditionalGeneration(config)


# --- data ---


def pixels(image: Image.Image, processor: CLIPImageProcessor) -> np.ndarray:
    """float32 [3, IMAGE_SIZE, IMAGE_SIZE] as CLIPImageProcessor makes it of a square picture, only faster."""
    small = np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), np.float32) / 255
    return ((small - np.float32(processor.image_mean)) / np.float32(processor.image_std)).transpose(2, 0, 1)


def patch_labels(scene: scenes.Scene) -> np.ndarray:
    """int64 [N_PATCHES, 3]: colour, shape and place from the left of the thing at each patch; 0 where there is none."""
    side = scenes.SIZE / GRID
    labels = np.zeros((N_PATCHES, 3), np.int64)
    for p in range(N_PATCHES):
        x, y = (p % GRID + 0.5) * side, (p // GRID + 0.5) * side
        near, rank = min((math.dist((x, y), (t.x, t.y)) - t.radius, i) for i, t in enumerate(scene.things))
        if near < 6:
            thing = scene.things[rank]
            labels[p] = list(scenes.COLORS).index(thing.color) + 1, scenes.SHAPES.index(thing.shape) + 1, rank + 1
    return labels


@dataclass
class Example:
    pixels: np.ndarray
    patches: np.ndarray
    present: np.ndarray  # float32 [n_colors * n_shapes + 3]: which things the scene holds, and how many
    ids: list[int]  # the row: prefix with image slots, then the questions
    segment: list[int]  # 0 for the prefix, 1.. for each question
    position: list[int]
    compared: list[tuple[int, int, int]]  # at the second thing that a question names: see Data.compares
    found: list[np.ndarray | None]  # at words for colours and shapes in questions: what they find
    weight: list[float]  # of tokens to be predicted: one over the length of the answer; 0 for the others


class Data(torch.utils.data.IterableDataset[Example]):
    """Endless examples; `kinds` says of what sort each question in them was."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        seed: str,
        questions: int,
        held_out: bool = False,
        kinds: tuple[str, ...] = tuple(scenes.KINDS),
    ) -> None:
        self.tokenizer, self.seed, self.questions, self.held_out = tokenizer, seed, questions, held_out
        self.kinds = kinds
        forms = {form: word for word in (*scenes.COLORS, *scenes.SHAPES) for form in (word, f"{word}s", f"{word}es")}
        self.sides = {
            tokenizer.encode(f" {w}", add_special_tokens=False)[0]: i for i, w in enumerate(("left", "right"))
        }
        self.words = {
            ids[0]: word
            for form, word in forms.items()
            if len(ids := tokenizer.encode(f" {form}", add_special_tokens=False)) == 1
        }
        self.processor = CLIPImageProcessor()

    def finds(self, scene: scenes.Scene, ask: list[int]) -> list[np.ndarray | None]:
        """For each token of a question that names a colour or shape, float32 [FOUND] of the things it means; a shape
        right after a colour means only the things that have both."""
        colors, shapes = list(scenes.COLORS), list(scenes.SHAPES)
        found: list[np.ndarray | None] = []
        color = None
        for token in ask:
            word = self.words.get(token)
            if word is None:
                found.append(None)
                color = None
                continue
            things = [t for t in scene.things if word in (t.color, t.shape) and color in (None, t.color)]
            color = word if word in colors else None
            label = np.zeros(FOUND, np.float32)
            for t in things:
                places = (colors.index(t.color), 8 + shapes.index(t.shape), 14 + scene.things.index(t))
                label[list(places)] = 1
            label[17 + len(things)] = 1
            found.append(label)
        return found

    def compares(self, scene: scenes.Scene, ask: list[int]) -> list[tuple[int, int, int]]:
        """For each token of a question that completes the name of a second thing: the place of the first, the side
        that is asked for (0 left, 1 right), and whether the answer is yes; NOT_COMPARED for the others."""
        labels, previous, side = [NOT_COMPARED] * len(ask), None, None
        for i in range(1, len(ask)):
            side = self.sides.get(ask[i], side)
            name = f"{self.words.get(ask[i - 1])} {self.words.get(ask[i])}"
            rank = next((r for r, t in enumerate(scene.things) if t.name == name), None)
            if rank is not None:
                if previous is not None and side is not None:
                    labels[i] = previous, side, int((previous < rank) == (side == 0))
                previous = rank
        return labels

    def __iter__(self) -> Iterator[Example]:
        t = self.tokenizer
        encode = lambda text: t.encode(text, add_special_tokens=False)  # noqa: E731
        user = encode("<|start_header_id|>user<|end_header_id|>\n\n")
        reply = encode("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")
        end = encode("<|eot_id|>")
        prefix = [t.bos_token_id, *user, *[t.convert_tokens_to_ids("<image>")] * N_PATCHES, *encode("\n")]
        for number, (scene, rng) in enumerate(scenes.sample_scenes(self.seed, self.held_out)):
            asked = scenes.sample_questions(scene, rng, self.questions, self.kinds)
            conversation = not self.held_out and number % 5 == 0
            ids, segment, position = list(prefix), [0] * len(prefix), list(range(len(prefix)))
            weight, found, compared = [0.0] * len(prefix), [None] * len(prefix), [NOT_COMPARED] * len(prefix)
            for i, q in enumerate(asked):
                text = q.question
                if not self.held_out and rng.random() < 0.15:
                    text = rng.choice((text.lower(), text.rstrip("?."), text.lower().rstrip("?.")))
                ask, answer = encode(text) + reply, encode(q.answer) + end
                if conversation and i > 0:
                    ask = user + ask
                start = len(ids) if conversation else len(prefix)
                ids += ask + answer
                finds = self.finds(scene, ask)
                found += [*finds, *[None] * len(answer)]
                compared += [*self.compares(scene, ask), *[NOT_COMPARED] * len(answer)]
                position += range(start, start + len(ask) + len(answer))
                segment += [0 if conversation else i + 1] * (len(ask) + len(answer))
                weight += [0.0] * len(ask) + [1 / len(answer)] * len(answer)
            present = np.zeros(len(scenes.COLORS) * len(scenes.SHAPES) + 3, np.float32)
            for thing in scene.things:
                present[
                    list(scenes.COLORS).index(thing.color) * len(scenes.SHAPES) + scenes.SHAPES.index(thing.shape)
                ] = 1
            present[len(present) - 4 + len(scene.things)] = 1
            yield Example(
                pixels(scenes.draw(scene), self.processor),
                patch_labels(scene),
                present,
                ids,
                segment,
                position,
                compared,
                found,
                weight,
            )


FOUND = len(scenes.COLORS) + len(scenes.SHAPES) + 3 + 4
"""Of the things that a word finds: their colours, shapes, places from the left, and how many they are."""


COMPARED = (3, 2, 2)
NOT_COMPARED = (-100, -100, -100)


@dataclass
class Batch:
    pixels: Tensor
    patches: Tensor
    present: Tensor
    ids: Tensor  # [batch, length]
    position: Tensor
    mask: Tensor  # bool [batch, 1, length, length]: True where a token may look
    targets: Tensor  # int64 [batch, length]: the token that follows, or -100
    weights: Tensor  # float32 [batch, length]: one over the length of the answer that a target belongs to
    segment: Tensor
    found_at: Tensor  # bool [batch, length]: words that find things
    found: Tensor  # float32 [words, FOUND], in the order of found_at
    compared: Tensor  # int64 [words, 3]


def collate(examples: list[Example]) -> Batch:
    length = max(len(e.ids) for e in examples)
    shape = (len(examples), length)
    ids, position = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    targets, segment, weights = torch.full(shape, -100), torch.full(shape, -1), torch.zeros(shape)
    found_at, found, compared = torch.zeros(shape, dtype=torch.bool), [], []
    for row, e in enumerate(examples):
        for i, label in enumerate(e.found):
            if label is not None:
                found_at[row, i] = True
                found.append(label)
                compared.append(e.compared[i])
        n = len(e.ids)
        ids[row, :n], position[row, :n] = torch.tensor(e.ids), torch.tensor(e.position)
        segment[row, :n] = torch.tensor(e.segment)
        follows = torch.where(torch.tensor(e.weight) > 0, ids[row, :n], -100)
        targets[row, : n - 1] = follows[1:]
        weights[row, : n - 1] = torch.tensor(e.weight)[1:]
    # A padding token (segment -1) sees its own kind, so that no row of the mask is empty.
    same = segment[:, :, None] == segment[:, None, :]
    mask = (same | ((segment[:, None, :] == 0) & (segment[:, :, None] >= 0))) & torch.tril(
        torch.ones(length, length, dtype=torch.bool)
    )
    stack = lambda arrays: torch.from_numpy(np.stack(arrays))  # noqa: E731
    return Batch(
        stack([e.pixels for e in examples]),
        stack([e.patches for e in examples]),
        stack([e.present for e in examples]),
        ids,
        position,
        mask[:, None],
        targets,
        weights,
        segment,
        found_at,
        torch.from_numpy(np.stack(found)) if found else torch.zeros(0, FOUND),
        torch.tensor(compared, dtype=torch.long).reshape(-1, 3),
    )


# --- learning ---


LOOKUP_LAYERS = (2, 3)
"""Hidden states of the decoder that the lookup heads read."""


class Heads(nn.Module):
    """What the supervision of tower and lookup reads from the model; not part of what is saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(scenes.COLORS) + 1, len(scenes.SHAPES) + 1, 4)
        self.patch = nn.Linear(width, sum(self.sizes))
        self.scene = nn.Linear(width, len(scenes.COLORS) * len(scenes.SHAPES) + 3)
        self.compared = nn.Linear(width, sum(COMPARED))
        self.found = nn.ModuleList([nn.Linear(width, FOUND) for _ in LOOKUP_LAYERS])

    def forward(self, patches: Tensor, pooled: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss, and the share of patches whose three labels are all right."""
        logits = self.patch(patches).split(self.sizes, -1)
        loss = sum(F.cross_entropy(p.flatten(0, 1), batch.patches[..., i].flatten()) for i, p in enumerate(logits))
        loss = loss + F.binary_cross_entropy_with_logits(self.scene(pooled), batch.present)
        right = torch.stack([p.argmax(-1) == batch.patches[..., i] for i, p in enumerate(logits)]).all(0)
        return loss, right.float().mean()


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    horizon: int  # steps after which the cosine would reach its end
    size: int  # scenes a batch
    questions: int  # about each scene; 1 where none is learnt from
    peak: float  # learning rate
    tower_weight: float  # of the heads' loss
    tower_rate: float = 1.0  # the tower's share of the learning rate
    per_answer: bool = False  # each answer counts the same, not each token
    kinds: tuple[str, ...] = tuple(scenes.KINDS)  # of questions
    naming_weight: float = 0.0  # of the loss that makes patches look like the words for what they show
    lookup_weight: float = 0.0  # of the loss on what a question's words find in the picture

    def rate(self, step: int) -> float:
        """Linear warm-up over 200 steps, then a cosine down to a hundredth of the peak."""
        return (
            self.peak * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / self.horizon)))
        )


LOOKUP = ("color", "shape", "count", "side", "exists")
"""Kinds of questions that must find a thing by what it looks like."""

STAGES = (
    Stage("tower", 2000, 2000, size=48, questions=1, peak=1e-3, tower_weight=1.0),
    Stage("llava", 1000, 4000, size=32, questions=6, peak=1e-3, tower_weight=0.2),
    Stage("answers", 250, 3000, size=32, questions=6, peak=8e-4, tower_weight=0.5, tower_rate=0.3, per_answer=True),
    Stage(
        "lookup",
        1250,
        1600,
        size=32,
        questions=6,
        peak=1e-3,
        tower_weight=0.5,
        tower_rate=0.3,
        per_answer=True,
        kinds=(*LOOKUP, *LOOKUP, "describe", "name", "place", "json"),
        naming_weight=0.3,
        lookup_weight=1.0,
    ),
    Stage(
        "sides",
        800,
        800,
        size=32,
        questions=6,
        peak=8e-4,
        tower_weight=0.5,
        tower_rate=0.3,
        per_answer=True,
        kinds=(*["side"] * 7, *scenes.KINDS),
        naming_weight=0.1,
        lookup_weight=1.0,
    ),
)


class Trainer:
    def __init__(self, work: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(SEED)
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer)
        self.heads = Heads(256)
        self.lookup_loss = torch.zeros(())
        self.image_token = self.tokenizer.convert_tokens_to_ids("<image>")

    def see(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The patches of the feature layer, with the loss and score of the heads on them."""
        out = self.model.model.vision_tower(batch.pixels, output_hidden_states=True)
        patches = out.hidden_states[FEATURE_LAYER][:, 1:]
        loss, right = self.heads(patches, out.pooler_output, batch)
        return patches, loss, right

    def name(self, batch: Batch, features: Tensor) -> Tensor:
        """How badly the projected patches resemble the words for their colour and shape, among all such words.

        A question finds what it asks about by likeness of words and patches; this gives it a start.
        """
        losses = []
        for column, words in enumerate((scenes.COLORS, scenes.SHAPES)):
            ids = [self.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in words]
            names = F.normalize(self.model.get_input_embeddings().weight[ids].float(), dim=-1)
            labels = batch.patches[..., column]
            shown = labels > 0
            likeness = F.normalize(features[shown].float(), dim=-1) @ names.T
            losses.append(F.cross_entropy(10 * likeness, labels[shown] - 1))
        return sum(losses, torch.zeros(()))

    def answer(self, batch: Batch, features: Tensor, per_answer: bool = False) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the answers' tokens, and which of them (bool [batch, length]) are the most likely."""
        embeds = self.model.get_input_embeddings()(batch.ids)
        slots = (batch.ids == self.image_token)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(slots, features.to(embeds.dtype))
        out = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=batch.mask,
            position_ids=batch.position,
            use_cache=False,
            output_hidden_states=True,
        )
        hidden = out.last_hidden_state
        self.lookup_loss = torch.zeros(())
        for head, layer in zip(self.heads.found, LOOKUP_LAYERS, strict=True):
            logits = head(out.hidden_states[layer][batch.found_at])
            self.lookup_loss = self.lookup_loss + F.binary_cross_entropy_with_logits(logits, batch.found)
        logits = self.heads.compared(out.hidden_states[LOOKUP_LAYERS[-1]][batch.found_at])
        if (batch.compared >= 0).any():
            for part, labels in zip(logits.split(COMPARED, -1), batch.compared.T, strict=True):
                self.lookup_loss = self.lookup_loss + F.cross_entropy(part, labels)
        wanted = batch.targets >= 0
        logits = self.model.lm_head(hidden[wanted]).float()
        right = torch.ones_like(wanted)
        right[wanted] = logits.argmax(-1) == batch.targets[wanted]
        losses = F.cross_entropy(logits, batch.targets[wanted], reduction="none")
        if not per_answer:
            return losses.mean(), right
        weights = batch.weights[wanted]
        return (losses * weights).sum() / weights.sum(), right

    def batches(self, s: Stage, first: int) -> Iterator[Batch]:
        # A run that goes on after a stop draws on from a seed of its own, rather than seeing the first scenes again.
        data = Data(self.tokenizer, f"{s.name} {SEED} from {first}", s.questions, kinds=s.kinds)
        return iter(torch.utils.data.DataLoader(data, batch_size=s.size, collate_fn=collate, num_workers=1))

    def groups(self, s: Stage) -> list[dict[str, object]]:
        """Parameters by learning rate and weight decay; vectors are not decayed."""
        tower = self.model.model.vision_tower
        mine = {id(p) for p in tower.parameters()}
        others = [p for p in [*self.model.parameters(), *self.heads.parameters()] if id(p) not in mine]
        return [
            {"params": [p for p in group if (p.ndim >= 2) == decays], "weight_decay": 0.05 * decays, "factor": factor}
            for group, factor in ((list(tower.parameters()), s.tower_rate), (others, 1.0))
            for decays in (True, False)
        ]

    def run(self, s: Stage) -> None:
        """Train one stage with AdamW, going on from its last checkpoint."""
        path = self.work / f"{s.name}.pt"
        parts = nn.ModuleList([self.model, self.heads])
        optimizer = torch.optim.AdamW(self.groups(s), betas=(0.9, 0.98))
        step = 0
        if path.exists():
            state = torch.load(path, weights_only=True)
            parts.load_state_dict(state["parts"])
            step = state["step"]
            if step < s.steps:
                optimizer.load_state_dict(state["optimizer"])
        started, first = time.monotonic(), step
        sums = np.zeros(4)
        batches = self.batches(s, first) if step < s.steps else iter(())
        while step < s.steps:
            for group in optimizer.param_groups:
                group["lr"] = s.rate(step) * group["factor"]
            batch = next(batches)
            with torch.autocast("cpu", torch.bfloat16):
                patches, seen, right = self.see(batch)
                loss, answered = s.tower_weight * seen, torch.zeros(())
                if s.questions > 1:
                    features = self.model.model.multi_modal_projector(patches)
                    answered = self.answer(batch, features, s.per_answer)[0]
                    loss = loss + answered + s.lookup_weight * self.lookup_loss
                    if s.naming_weight:
                        loss = loss + s.naming_weight * self.name(batch, features)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
            optimizer.step()
            step += 1
            sums += answered.item(), seen.item(), right.item(), self.lookup_loss.item()
            if step % 50 == 0:
                a, t, r, lookup = sums / 50
                pace = (step - first) * s.size / (time.monotonic() - started)
                losses = f"answers {a:.4f} tower {t:.4f} {r:.3f} lookup {lookup:.4f}"
                print(f"{s.name} {step}/{s.steps} {losses} {pace:.0f} images/s", flush=True)
                sums[:] = 0
            if step % 250 == 0 or step == s.steps:
                if s.questions > 1:
                    print(f"{s.name} {step} exact: {self.evaluate(64)}", flush=True)
                state = {"parts": parts.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").rename(path)

    @torch.no_grad()
    def evaluate(self, count: int) -> str:
        """Exact answers to held-out questions, all kinds of them about each scene, teacher-forced: an answer whose
        every token is the most likely one after the true ones before it is the greedy answer."""
        questions = len(scenes.KINDS)
        data = iter(Data(self.tokenizer, f"evaluation {SEED}", questions, held_out=True))
        right = total = 0
        for _ in range(count // 16):
            batch = collate([next(data) for _ in range(16)])
            with torch.autocast("cpu", torch.bfloat16):
                patches, _, _ = self.see(batch)
                _, hits = self.answer(batch, self.model.model.multi_modal_projector(patches))
            for s in range(1, questions + 1):
                right += int((hits | (batch.segment != s)).all(-1).sum())
                total += len(hits)
        return f"{right}/{total} = {right / total:.3f}"

    def save(self, out: Path) -> None:
        """Write the model as float16, with tokenizer and processor, in transformers' own format."""
        model = self.model.to(torch.float16)
        model.generation_config = GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        model.save_pretrained(out)
        build_processor(self.tokenizer).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the checkpoints of the training")
    parser.add_argument("--out", type=Path, default=HERE, help="where --save writes the model (default: here)")
    parser.add_argument("--save", action="store_true", help="train what is left to train, then write the model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    random.seed(SEED)
    trainer = Trainer(args.work, args.threads)
    for stage in STAGES:
        trainer.run(stage)
    if args.save:
        trainer.save(args.out)


if __name__ == "__main__":
    main()
