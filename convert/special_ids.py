"""The ids of special tokens: where a sequence begins and ends, where a turn does, what stands for a picture.

Knows the files that checkpoints keep them in. Does not know how text is tokenized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_llava.convert.added_tokens import AddedToken
from local_llava.convert.config import Config, read_json
from local_llava.errors import CheckpointError
from local_llava.llm_vocab import END_OF_TURN


@dataclass(frozen=True)
class SpecialIds:
    """Finds special ids in the files that may hold them."""

    directory: Path
    config: Mapping[str, Any]
    added: Sequence[AddedToken]

    def find(self, name: str) -> int | None:
        """The id of "bos", "eos" or "pad": by number in the configurations, else by text in the tokenizer's.

        Only ids of added tokens count: transformers' defaults for what a configuration leaves out are Llama 2's.
        """
        known = {t.id for t in self.added}
        by_text = {t.content: t.id for t in self.added}
        for where in (self.config.get("text_config"), self.config, self._read("generation_config.json")):
            value = where.get(f"{name}_token_id") if isinstance(where, Mapping) else None
            # A list of ends holds the model's own first.
            for i in value if isinstance(value, list) else [value]:
                if isinstance(i, int) and not isinstance(i, bool) and i in known:
                    return i
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self._read(file).get(f"{name}_token")
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str) and text in by_text:
                return by_text[text]
        return None

    def need(self, name: str) -> int:
        found = self.find(name)
        if found is None:
            path = self.directory / "tokenizer_config.json"
            raise CheckpointError(
                f"{path}: {name}_token is missing, and config.json's {name}_token_id is no added token"
            )
        return found

    def image(self, n_rows: int) -> int | None:
        path = self.directory / "config.json"
        for key in ("image_token_index", "image_token_id"):
            value = self.config.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value >= n_rows:
                raise CheckpointError(f"{path}: {key} must be a token id below {n_rows}, not {value!a:.40}")
            if value >= 0:  # the official code's -200 is no token
                return value
        return next((t.id for t in self.added if t.content == "<image>"), None)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        return read_json(path) if path.is_file() else {}


def sequence_ends(root: Config, bos: int, eos: int) -> tuple[bool, bool]:
    """Whether BOS and EOS are put around a text: by the post-processor, whatever tokenizer_config.json says.

    Without a template for it BOS is put: Llama 3's first tokenizer.json had none, and the model was trained with it.
    """
    step = root.sub("post_processor").values
    parts = step.get("processors") if step.get("type") == "Sequence" else [step] if step else []
    if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
        raise CheckpointError(f"{root.name('post_processor')}.processors must be a list of objects")
    templates = [p for p in parts if p.get("type") == "TemplateProcessing"]
    others = [p.get("type") for p in parts if p.get("type") not in ("TemplateProcessing", "ByteLevel")]
    if others or len(templates) > 1:
        raise CheckpointError(
            f"{root.name('post_processor')} has {(others or ['two templates'])[0]!a:.40}; "
            "supported are ByteLevel and one TemplateProcessing"
        )
    if not templates:
        return True, False
    before, after = _template_ids(root, templates[0])
    if before not in ([], [bos]) or after not in ([], [eos]):
        raise CheckpointError(
            f"{root.name('post_processor')}.single puts the ids {before} before and {after} after a text; "
            f"only BOS ({bos}) before and EOS ({eos}) after are supported"
        )
    return bool(before), bool(after)


def configured_ends(directory: Path) -> tuple[bool, bool]:
    """The same by tokenizer_config.json, which counts where there is no post-processor, with Llama's defaults."""
    path = directory / "tokenizer_config.json"
    config = Config(path, read_json(path) if path.is_file() else {})
    return config.flag("add_bos_token", True), config.flag("add_eos_token", False)


def _template_ids(root: Config, template: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Ids before and after the text in a TemplateProcessing's `single`."""
    try:
        names = [None if "Sequence" in piece else str(piece["SpecialToken"]["id"]) for piece in template["single"]]
        ids = [[int(i) for i in template["special_tokens"][name]["ids"]] if name is not None else [] for name in names]
        text = names.index(None)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise CheckpointError(f"{root.name('post_processor')}.single is not a valid template") from e
    return [i for part in ids[:text] for i in part], [i for part in ids[text:] for i in part]


def end_of_turn(template: str, added: Sequence[AddedToken]) -> int | None:
    """The chat's end of turn: the known token that its template writes, else the first one the vocabulary has."""
    ids = {t.content: t.id for t in added}
    known = [text for text in END_OF_TURN if text in ids]
    return next((ids[text] for text in known if text in template), ids[known[0]] if known else None)
