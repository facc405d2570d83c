"""Texts that split oddly, and a vocabulary of ours as llama.cpp reads it."""

# ruff: noqa: RUF001

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable
from pathlib import Path

import llama_cpp as lib
from gguf import GGUFWriter

from local_llava.convert.plan import Field
from local_llava.convert.tokenizer import Tokenizer
from local_llava.gguf_file import GGUFFile
from local_llava.llm_vocab import check_vocab

SENTENCES = (
    "The cat sat on the mat, didn't it? I'll say SHE'D've known; they're 12,345.67 miles away.",
    "Ein schöner Größenvergleich: zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.",
    "Où est passé l'œuf ? Là-bas, près de l'âne, à côté du vieux chêne.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia, ¿verdad? ¡Sí!",
    "Quanto costa un caffè? Perché no: è già mezzogiorno.",
    "A ação começou às três horas; ninguém sabia porquê.",
    "Zażółć gęślą jaźń. Pchnąć w tę łódź jeża lub ośm skrzyń fig.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Árvíztűrő tükörfúrógép, jó reggelt kívánok!",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul ılık.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Чуєш їх, доцю, га? Кумедна ж ти, прощайся без ґольфів!",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία· καλημέρα σας.",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر. ١٢٣٤٥",
    "گربه روی میز نشسته است و ۵۶ کتاب دارد.",
    "ایک دفعہ کا ذکر ہے کہ ایک لومڑی تھی۔",
    "ऋषियों को सताने वाले राक्षसों का अंत हो गया। १२३",
    "আমি বাংলায় গান গাই, আমি বাংলার গান গাই। ৪৫৬",
    "ਸਤ ਸ੍ਰੀ ਅਕਾਲ, ਤੁਸੀਂ ਕਿਵੇਂ ਹੋ?",
    "નમસ્તે, આજે હવામાન કેવું છે?",
    "யாதும் ஊரே யாவரும் கேளிர். ௧௨௩",
    "తెలుగు భాష చాలా మధురమైనది.",
    "ಕನ್ನಡ ನಾಡು ಸುಂದರವಾಗಿದೆ.",
    "മലയാളം ഒരു ദ്രാവിഡ ഭാഷയാണ്.",
    "ආයුබෝවන්, ඔබට කොහොමද?",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "ສະບາຍດີ ທ່ານສະບາຍດີບໍ?",
    "မင်္ဂလာပါ၊ နေကောင်းလား။",
    "សួស្តី តើអ្នកសុខសប្បាយទេ?",
    "གཞོན་ནུ་དཔལ་གྱིས་ཡི་གེ་བྲིས།",
    "ქართული ენა ძალიან ლამაზია.",
    "Բարեւ Ձեզ, ինչպե՞ս եք։",
    "ሰላም ለዓለም፤ እንዴት ነህ?",
    "天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。",
    "いろはにほへと ちりぬるを。カタカナも漢字も書く。",
    "다람쥐 헌 쳇바퀴에 타고파. 안녕하세요!",
    "Con sói nâu nhảy qua hàng rào; trời đẹp quá nhỉ?",
    "ᏣᎳᎩ ᎦᏬᏂᎯᏍᏗ, ᐃᓄᒃᑎᑐᑦ, ᛁᚲ ᛖᚲ, 𐌲𐌿𐍄, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚𝟛",
    "def f(x):\n\treturn {'a': x**2, \"b\": [1, 2, 3][::-1]}  # ok\r\n\r\n    if x != 0x1F: pass\n",
)

UNICODE_16 = (
    (0x1C89, 0x1C8A),
    (0xA7CB, 0xA7CD),
    (0xA7DA, 0xA7DC),
    (0x105C0, 0x105F3),
    (0x10D40, 0x10D65),
    (0x10D6F, 0x10D85),
    (0x10EC2, 0x10EC4),
    (0x11380, 0x11389),
    (0x1138B, 0x1138B),
    (0x1138E, 0x1138E),
    (0x11390, 0x113B5),
    (0x113B7, 0x113B7),
    (0x113D1, 0x113D1),
    (0x113D3, 0x113D3),
    (0x116D0, 0x116E3),
    (0x11BC0, 0x11BE0),
    (0x11BF0, 0x11BF9),
    (0x13460, 0x143FA),
    (0x16100, 0x1611D),
    (0x16130, 0x16139),
    (0x16D40, 0x16D6C),
    (0x16D70, 0x16D79),
    (0x18CFF, 0x18CFF),
    (0x1CCF0, 0x1CCF9),
    (0x1E5D0, 0x1E5ED),
    (0x1E5F0, 0x1E5FA),
)
"""The 4,302 letters and 80 digits that Unicode 16 added (September 2024): the tokenizers library's regular expressions
know them, llama.cpp's tables are older. Text with them is split in other places. Llama 3 never saw them."""

NEW = frozenset(chr(c) for first, last in UNICODE_16 for c in range(first, last + 1))


class Vocab:
    """A vocabulary in llama.cpp, from a GGUF with our metadata."""

    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        self.gguf = write_vocab(tokenizer, path)
        self.checked = check_vocab(self.gguf)
        params = lib.llama_model_default_params()
        params.vocab_only = True
        self.model = lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.buffer = (lib.llama_token * 65536)()

    def encode(self, text: str, special: bool, ends: bool = False) -> list[int]:
        raw = text.encode()
        n = lib.llama_tokenize(self.vocab, raw, len(raw), self.buffer, len(self.buffer), ends, special)
        assert n >= 0
        return list(self.buffer[:n])

    def decode(self, tokens: list[int]) -> str:
        piece = ctypes.create_string_buffer(512)
        out = b""
        for token in tokens:
            n = lib.llama_token_to_piece(self.vocab, token, piece, len(piece), 0, True)
            assert n >= 0
            out += piece.raw[:n]
        return out.decode()


def write_vocab(tokenizer: Tokenizer, path: Path) -> GGUFFile:
    """A GGUF with our metadata and no tensors."""
    return write_fields(tokenizer.fields(), path)


def write_fields(fields: Iterable[Field], path: Path) -> GGUFFile:
    writer = GGUFWriter(path, "llama")
    for f in fields:
        writer.add_key_value(f.key, f.value, f.type, f.item_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return GGUFFile.open(path)


def fuzz(n: int, seed: int, specials: tuple[str, ...]) -> list[str]:
    """Strings of everything that splits oddly, and pieces of real text."""
    rng = random.Random(seed)
    pools: list[tuple[str, ...]] = [
        tuple(" \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u2028\u2029\u202f\u205f\u3000\u200b\u180e\ufeff"),
        (" ", "  ", "    ", "\n", "\n\n", "\r\n", " \n ", "\t\t", " \r"),
        ("'s", "'T", "'re", "'VE", "'m", "'lL", "'D", "'\u017f", "'\u212a", "\u2019s", "'", "''ll", "'r", "'v"),
        (*"0123456789\u0660\u0967\u0e51\u00b2\u00bd\u2167\u3007", "1234567", "3.14", "1,000,000"),
        (*"abcdefgXYZ\u00e9\u00df\u0130\u0131\u01c5\ufb01\u02b0", "hello", "World", "camelCase"),
        (*'!?.,;:-_()[]{}<|>@#$%^&*+=~`"\\/', "<|", "|>", "...", "```", "=>", "\u00bf", "\u20ac"),
        (
            "\U0001f600",
            "\U0001f469\u200d\U0001f469\u200d\U0001f467",
            "\U0001f44d\U0001f3fd",
            "\U0001f1e9\U0001f1ea",
            "\u2764\ufe0f",
        ),
        ("e\u0301", "\u0301", "n\u0303\u0300", "\u093f", "\u0e31", "\u05b8", "\u0651", "\u20dd"),
        tuple("\0\x01\x07\x1b\x7f\x9f\xad\u200e\ufffd\ufffe\U000e0001\U0010ffff"),
        specials,
    ]

    def character() -> str:
        while True:
            c = chr(rng.randrange(rng.choice([0x80, 0x500, 0x3000, 0x11000, 0x20000, 0x110000])))
            if not "\ud800" <= c <= "\udfff" and c not in NEW:
                return c

    def piece(chosen: list[tuple[str, ...]]) -> str:
        kind = rng.random()
        if kind < 0.1:
            sentence = rng.choice(SENTENCES)
            start = rng.randrange(len(sentence))
            return sentence[start : start + rng.randrange(1, 30)]
        return character() if kind < 0.25 else rng.choice(rng.choice(chosen))

    texts = [*SENTENCES, "", *specials]
    while len(texts) < n:
        chosen = rng.sample(pools, rng.randint(1, 4))
        texts.append("".join(piece(chosen) for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 21]))))
    return texts[:n]
