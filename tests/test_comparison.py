"""Models compared with a reference: the numbers, what cannot be compared, and that nothing is left on disk."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import scenes
from faulty_ggufs import TEMPLATE, put, spoil
from llava_checkpoints import TINY, random_model, save
from next_checkpoints import random_next_model, save_next
from numpy.typing import NDArray
from PIL import Image
from scipy.special import rel_entr, softmax
from tiny_world import forget_everything

from local_llava import EngineError, ImageError, Llava, ModelFileError, OutputError, UsageError, comparison
from local_llava import comparison_plot as plot
from local_llava.comparison import Comparison, Matrix, Progress, compare
from local_llava.comparison_measures import Divergence
from local_llava.comparison_store import StoredRows
from local_llava.convert import convert, quantize_gguf
from local_llava.gguf_file import GGUFFile
from local_llava.llm import LLM
from local_llava.picture_sets import Question, pictures_in, questions_about
from local_llava.types import ModelFiles
from local_llava.vision import VisionTower

EXACT: dict[str, Any] = {"kv_type": "F32", "n_threads": 1}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    scenes.write(directory, seed=11, count=3, questions=2)
    return directory


@pytest.fixture(scope="module")
def asked(directory: Path) -> list[Question]:
    return questions_about(directory, directory / "questions.jsonl", ())


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go; there are none in the end."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def open_temporary_files() -> list[str]:
    if sys.platform != "linux":
        return []
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except OSError:
            continue
    return [link for link in links if f"{tempfile.gettempdir()}/" in link]


def changed(source: Path, target: Path, name: str, change: Callable[[NDArray[np.float32]], Any]) -> Path:
    """A copy with other numbers in a tensor of float32."""
    info = GGUFFile.open(source).tensors[name]
    content = bytearray(source.read_bytes())
    values = change(np.frombuffer(content, "<f4", info.nbytes // 4, info.offset))
    content[info.offset : info.offset + info.nbytes] = values.astype("<f4").tobytes()
    target.write_bytes(content)
    return target


def scaled(source: Path, target: Path, factor: float) -> Path:
    """A copy whose logits are so many times those of the source, in float32."""
    return changed(source, target, "output_norm.weight", lambda values: values * np.float32(factor))


# --- the numbers ---


def test_a_model_beside_itself(tiny: ModelFiles, asked: list[Question], temporary: Path) -> None:
    for options in (EXACT, {}):
        seen: list[Progress] = []
        results = compare(tiny.model, [tiny.model], asked, on_progress=seen.append, **options)
        for result in results:
            assert (result.kl_mean, result.kl_p99, result.perplexity_ratio) == (0.0, 0.0, 1.0)
            assert result.same_top == result.same_answers == 1.0
            assert result.feature_error == 0.0 and result.decode_tokens_per_s > 0 and result.perplexity >= 1
            assert (result.quant, result.mmproj_quant, result.matrix) == ("F32", "F32", None)
            assert (result.model_bytes, result.mmproj_bytes) == tiny.sizes and result.files == tiny
        assert [(p.step, p.done, p.total) for p in seen] == [
            (step, i, len(asked)) for step in ("answers", "compares", "compares") for i in range(1, len(asked) + 1)
        ]
    assert not list(temporary.iterdir()) and not open_temporary_files()


def test_rounded_models_beside_themselves(asked: list[Question], tmp_path: Path) -> None:
    """What is rounded does not depend on how the reference came to its answers."""
    files = convert(TINY, tmp_path, quant="Q3_K_M")
    one, other = compare(files.model, [files.model.parent], asked)
    assert (other.kl_mean, other.kl_p99, other.same_top, other.perplexity_ratio) == (0.0, 0.0, 1.0, 1.0)
    assert other.perplexity == one.perplexity


@pytest.mark.parametrize(("factor", "max_tokens"), [(0.25, 64), (-0.5, 3)])
def test_a_known_perturbation(
    factor: float, max_tokens: int, tiny: ModelFiles, asked: list[Question], tmp_path: Path
) -> None:
    """Against formulas of scipy's, from logits that come one by one. With a negative factor, least and most likely
    change places."""
    model = scaled(tiny.model, tmp_path / "scaled.gguf", factor)
    (_, result) = compare(tiny.model, [model], asked, max_tokens=max_tokens, **EXACT)
    divergences, ours, theirs = [], [], []
    with Llava.load(tiny.model, tiny.mmproj, **EXACT) as llava:
        for question in asked:
            reply = llava.ask(question.text, question.image, max_tokens=max_tokens)
            prompt = llava.prompt_tokens(question.text, question.image)
            ends = reply.finish_reason == "stop"
            for i in range(len(reply.tokens) + ends):
                logits = llava.answer_logits([*prompt, *reply.tokens[:i]], (), question.image)[0].astype(np.float64)
                p, q = softmax(logits), softmax(factor * logits)
                token = reply.tokens[i] if i < len(reply.tokens) else int(logits.argmax())
                divergences.append(rel_entr(p, q).sum())
                ours.append(p[token])
                theirs.append(q[token])
    assert result.positions == len(divergences) > 10
    assert result.kl_mean == pytest.approx(np.mean(divergences), rel=1e-4)
    assert result.kl_p99 == pytest.approx(np.percentile(divergences, 99), rel=1e-4)
    assert result.same_top == (1.0 if factor > 0 else 0.0)
    assert result.perplexity == pytest.approx(np.exp(-np.mean(np.log(theirs))), rel=1e-4)
    assert result.perplexity_ratio == pytest.approx(np.exp(-np.mean(np.log(theirs)) + np.mean(np.log(ours))), rel=1e-4)
    assert result.kl_mean > 0.1 and result.perplexity_ratio > 1.1


def test_same_answers_are_those_that_the_model_gives(tiny: ModelFiles, directory: Path, tmp_path: Path) -> None:
    """With so much noise that some answers change."""
    noise = np.random.default_rng(0).normal(0, 0.05, 640 * 256)
    model = changed(tiny.model, tmp_path / "noisy.gguf", "output.weight", lambda values: values + noise)
    questions = questions_about(directory, None, ("What do you see?", "Hm?", "Why is it so?", "Name the colours."))
    (_, result) = compare(tiny.model, [model], questions, max_tokens=20, **EXACT)
    answers = []
    for path in (tiny.model, model):
        with Llava.load(path, tiny.mmproj, max_tokens=20, **EXACT) as llava:
            answers.append([llava.ask(question.text, question.image).tokens for question in questions])
    assert result.same_answers == np.mean([a == b for a, b in zip(*answers, strict=True)])
    assert 0 < result.same_answers < 1 and result.same_answers < result.same_top < 1


def test_divergence_of_arrays() -> None:
    rng = np.random.default_rng(0)
    reference, logits = (rng.normal(0, 8, (300, 5000)).astype(np.float32) for _ in range(2))
    logits[::2] = reference[::2] + rng.normal(0, 0.1, (150, 5000)).astype(np.float32)
    divergence = Divergence()
    for i in range(0, 300, 100):
        divergence.add(reference[i : i + 100], logits[i : i + 100], [7, None] * 50)
    p, q = (softmax(values.astype(np.float64), axis=1) for values in (reference, logits))
    expected = rel_entr(p, q).sum(axis=1)
    assert divergence.n == 300
    assert divergence.kl_mean == pytest.approx(expected.mean(), rel=1e-9)
    assert divergence.kl_p99 == pytest.approx(np.sort(expected)[296:298] @ [0.99, 0.01], rel=1e-9)
    same = reference.argmax(axis=1) == logits.argmax(axis=1)
    assert divergence.same_top == same.mean() and 0.4 < divergence.same_top < 0.8
    assert divergence.same_answers == 0
    tokens = np.where(np.arange(300) % 2, reference.argmax(axis=1), 7)
    assert divergence.perplexity == pytest.approx(np.exp(-np.log(q[np.arange(300), tokens]).mean()), rel=1e-9)
    divergence.add(reference[:3], reference[:3], [1, 2, 3])
    assert divergence.same_answers == 0.25
    huge = Divergence()
    huge.add(np.array([[1e38, -1e38, 0]], np.float32), np.array([[1e38, 1e38, -1e38]], np.float32), [0])
    assert huge.kl_mean == pytest.approx(np.log(2))
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(EngineError, match="not all finite"):
            Divergence().add(np.zeros((1, 3), np.float32), np.array([[0, 0, bad]], np.float32), [0])


def test_towers_are_compared_and_see_a_picture_once(
    tiny: ModelFiles, asked: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = []
    for quant in ("F16", "Q8_0"):
        (tmp_path / quant).mkdir()
        quantize_gguf(tiny.mmproj, tmp_path / quant / "mmproj.gguf", quant)
        others.append(tmp_path / quant / "model.gguf")
        others[-1].write_bytes(tiny.model.read_bytes())
    n = 0
    begin = VisionTower.begin

    def counted(tower: VisionTower, pixels: NDArray[np.float32]) -> Any:
        nonlocal n
        n += len(pixels)
        return begin(tower, pixels)

    monkeypatch.setattr(VisionTower, "begin", counted)
    results = compare(tiny.model, [*others, *others, tiny.model], asked, **EXACT)
    images = list(dict.fromkeys(question.image for question in asked))
    assert n == 3 * len(images), "once for each of three towers"
    assert [r.mmproj_quant for r in results] == ["F32", "F16", "Q8_0", "F16", "Q8_0", "F32"]
    monkeypatch.undo()
    with Llava.load(tiny.model, tiny.mmproj, **EXACT) as llava:
        exact = [llava.embed_images(image)[0] for image in images]
        forget_everything(llava)
    for result in results[1:]:
        with Llava.load(tiny.model, result.files.mmproj, **EXACT) as llava:
            values = [llava.embed_images(image)[0] for image in images]
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(values, exact, strict=True)]
        assert result.feature_error == pytest.approx(np.mean(errors), rel=1e-3, abs=1e-12)
    assert results[5].feature_error == 0 < results[1].feature_error < results[2].feature_error < 0.1
    assert results[1].kl_mean == results[3].kl_mean > 0 and results[5].kl_mean == 0


def test_a_matrix_is_told(tiny: ModelFiles, asked: list[Question], tmp_path: Path) -> None:
    def noted(entries: dict[str, Any]) -> None:
        put("quantize.imatrix.file", "str", "m.gguf")(entries)
        put("quantize.imatrix.dataset", "str", "my pictures")(entries)

    model = spoil(tiny.model, tmp_path / "model.gguf", noted)
    (reference, result) = compare(tiny.model, [model], asked[:1], **EXACT)
    assert reference.matrix is None and result.matrix == Matrix("m.gguf", "my pictures") and result.kl_mean == 0
    assert result.files.mmproj == tiny.mmproj, "the reference's, since none is beside it"


# --- what cannot be compared ---


def test_another_chat_template_is_noted(
    tiny: ModelFiles, asked: list[Question], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = GGUFFile.open(tiny.model).metadata[TEMPLATE]
    model = spoil(tiny.model, tmp_path / "model.gguf", put(TEMPLATE, "str", "{# another #}" + text))
    (_, result) = compare(tiny.model, [model], asked[:2], **EXACT)
    assert result.kl_mean == 0
    assert f"{model} has another chat template than {tiny.model}: it is given that one's prompts" in caplog.messages


def test_another_vocabulary(tiny: ModelFiles, asked: list[Question], tmp_path: Path) -> None:
    def renamed(entries: dict[str, Any]) -> None:
        entries["tokenizer.ggml.tokens"][1][300] = "other"

    model = spoil(tiny.model, tmp_path / "model.gguf", renamed)
    with pytest.raises(ModelFileError, match=r"model.gguf cannot be compared with .*: its token 300 is 'other', not"):
        compare(tiny.model, [model], asked)
    checkpoint = save(random_model({"vocab_size": 672}), tmp_path / "checkpoint")
    files = convert(checkpoint, tmp_path / "out", quant="F32")
    with pytest.raises(ModelFileError, match="it has 672 tokens, not 640"):
        compare(tiny.model, [tiny.model, files.model], asked)


def test_another_number_of_image_tokens(tiny: ModelFiles, asked: list[Question], tmp_path: Path) -> None:
    files = convert(save(random_model(), tmp_path / "checkpoint"), tmp_path / "out", quant="F32")
    with pytest.raises(ModelFileError, match=r"0000.png takes 4 tokens of the one, 36 of the other"):
        compare(tiny.model, [files.model], asked)


def test_tiles_count_by_the_size_of_the_picture(tmp_path: Path) -> None:
    """LLaVA-NeXT beside itself, with pictures of several shapes."""
    checkpoint = save_next(random_next_model([(28, 56), (56, 28), (56, 56)]), tmp_path / "checkpoint")
    files = convert(checkpoint, tmp_path / "out", quant="F32", mmproj_quant="F32")
    pictures = []
    for i, size in enumerate(((60, 28), (28, 90), (40, 40))):
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
        pictures.append(tmp_path / f"{i}.png")
        Image.fromarray(noise).save(pictures[-1])
    questions = [Question(path, "Hm?") for path in pictures]
    (_, result) = compare(files.model, [files.model], questions, max_tokens=5)
    assert result.kl_mean == result.feature_error == 0 and result.positions >= 3


def test_a_reference_that_says_nothing(
    tiny: ModelFiles, asked: list[Question], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "ends_turn", lambda self, token: True)
    with pytest.raises(EngineError, match="answers none of the questions: there is nothing to compare"):
        compare(tiny.model, [tiny.model], asked)
    assert not list(temporary.iterdir()) and not open_temporary_files()


def test_bad_arguments(tiny: ModelFiles, asked: list[Question], tmp_path: Path) -> None:
    for options, message in (
        ({"temperature": 1}, "a comparison takes no option 'temperature'; there are system, preprocess,"),
        ({"max_tokens": 0}, "max_tokens must be 1 to"),
        ({"kv_type": "Q1"}, "kv_type must be one of"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(tiny.model, [tiny.model], asked, **options)
    with pytest.raises(UsageError, match="there are no questions"):
        compare(tiny.model, [tiny.model], [])
    torn = tmp_path / "torn.png"
    torn.write_bytes(asked[0].image.read_bytes()[:300])
    with pytest.raises(ImageError, match=r"torn.png"):
        compare(tiny.model, [tiny.model], [*asked, Question(torn, "?")])


def failing(name: str, error: BaseException) -> Callable[..., Llava]:
    load = Llava.load

    def instead(model: Path, *args: Any, **options: Any) -> Llava:
        if model.name == name:
            raise error
        return load(model, *args, **options)

    return instead


def test_one_of_several_fails(
    tiny: ModelFiles, asked: list[Question], tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(tiny.model.read_bytes())
    monkeypatch.setattr(comparison.Llava, "load", failing("bad.gguf", EngineError("no room")))
    failed: list[tuple[str, str]] = []
    models = [tiny.model, bad, tiny.model]
    results = compare(tiny.model, models, asked, on_failure=lambda name, e: failed.append((name, str(e))), **EXACT)
    assert [r.kl_mean for r in results] == [0, 0, 0] and failed == [(str(bad), "no room")]
    with pytest.raises(EngineError, match="no room"):
        compare(tiny.model, models, asked, **EXACT)
    with pytest.raises(EngineError, match="no room"):  # of the reference
        compare(bad, [tiny.model], asked, mmproj=tiny.mmproj, on_failure=lambda *_: None, **EXACT)
    assert not list(temporary.iterdir()) and not open_temporary_files()


def test_an_interrupted_comparison_leaves_nothing(
    tiny: ModelFiles, asked: list[Question], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == "compares" and progress.done == 2:
            assert open_temporary_files() or sys.platform != "linux"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(tiny.model, [tiny.model], asked, on_progress=stop, **EXACT)
    assert not list(temporary.iterdir()) and not open_temporary_files()


def test_the_room_on_the_disk_is_looked_at(
    tiny: ModelFiles, asked: list[Question], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = __import__("shutil").disk_usage(temporary)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=50_000))
    with pytest.raises(OutputError, match=r"0.0 GB free, and 0.0 GB are needed for the reference's logits: take fewer"):
        compare(tiny.model, [tiny.model], asked, **EXACT)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "not there"))
    with pytest.raises(OutputError, match="TMPDIR"):
        compare(tiny.model, [tiny.model], asked, **EXACT)


def test_stored_rows(temporary: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 1000)).astype(np.float32) for n in (3, 0, 700)]
    with StoredRows(1000) as rows:
        assert [rows.append(part) for part in parts] == [0, 3, 3] and rows.n == 703
        assert np.array_equal(rows.read(0, 3), parts[0]) and np.array_equal(rows.read(3, 700), parts[2])
        assert np.array_equal(rows.read(100, 1), parts[2][97:98])
        with pytest.raises(OutputError, match="shorter"):
            rows.read(700, 4)
    assert not list(temporary.iterdir())


# --- pictures and questions ---


def test_questions_about_pictures(directory: Path, tmp_path: Path) -> None:
    images = pictures_in(directory)
    assert [path.name for path in images] == ["0000.png", "0001.png", "0002.png"]
    assert questions_about(directory, None, ("a", "b")) == [Question(p, t) for p in images for t in ("a", "b")]
    text = tmp_path / "questions.txt"
    text.write_bytes("\ufeffWhat?\r\n\r\n  Было\u2028ли? \n".encode())
    assert questions_about(directory, text, ()) == [Question(p, t) for p in images for t in ("What?", "Было\u2028ли?")]
    lines = tmp_path / "questions.jsonl"
    lines.write_text(
        '{"image": "0002.png", "question": "a"}\n{"image": "0000.png", "question": "b", "kind": 1}\n\n'
        '{"image": "0002.png", "question": "c"}'
    )
    assert [(q.image.name, q.text) for q in questions_about(directory, lines, ())] == [
        ("0002.png", "a"),
        ("0002.png", "c"),
        ("0000.png", "b"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", b"\n \n", "there are no questions in it"),
        ("q.txt", b"\xff\xfe", "it is not UTF-8 text"),
        ("q.jsonl", b"What?", "line 1: must be a JSON object such as"),
        ("q.jsonl", b'{"image": "0000.png"}', "line 1: must be a JSON object"),
        ("q.jsonl", b'\n{"image": "0000.png", "question": 5}', "line 2: must be a JSON object"),
        ("q.jsonl", b"[" * 100_000, "line 1: must be a JSON object"),
        ("q.jsonl", b'{"image": "no.png", "question": "?"}', "no.png is not there"),
        ("q.jsonl", b'{"image": "a\\u0000b", "question": "?"}', "is not there"),
    ],
)
def test_bad_questions(directory: Path, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((UsageError, ImageError)) as error:
        questions_about(directory, tmp_path / name, ())
    assert message in str(error.value) and name in str(error.value) and "\n" not in str(error.value)


# --- the plot ---


def row(name: str, quant: str, bits: float, kl: float, matrix: Matrix | None = None, mmproj: str = "F16") -> Comparison:
    files, size = ModelFiles(Path(name), Path("mmproj")), int(bits * 1e9)
    return Comparison(
        name, files, quant, mmproj, size, 600_000_000, matrix, 99, kl, 9 * kl, 0.9, 0.8, 1.2, 1.1, 0.1, 20.0
    )


REFERENCE = row("reference", "F16", 16, 0)
TYPES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_K_M", "Q4_1")
CROWD = [
    row(f"{quant}-{i}", quant, 3 + 0.2 * j, 0.5 * 0.6**j, matrix)
    for i, matrix in enumerate((None, Matrix("m.gguf", "pictures")))
    for j, quant in enumerate(TYPES)
]


@pytest.mark.parametrize("models", [CROWD, [row("$a$_{", "", 4, 0)], [row(f"/m/{i}", "", 4, 1e-9) for i in "日b"]])
def test_plots_are_pictures(models: list[Comparison], tmp_path: Path) -> None:
    for name in ("plot.png", "plot.svg"):
        plot.draw([REFERENCE, *models], tmp_path / name)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.format == "PNG" and image.size == (1200, 900)
        assert len(np.unique(np.asarray(image))) > 20
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(tmp_path.iterdir())) == 2


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "B.SVG"):
        plot.draw([REFERENCE, *CROWD[:3]], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "B.SVG").read_bytes()


def test_labels_do_not_hide_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    covered = []
    place = plot._place

    def watched(point: Any, width: float, height: float, taken: list[plot.Box], frame: plot.Box) -> Any:
        dx, dy, distance = place(point, width, height, taken, frame)
        x, y = point[0] + dx, point[1] + dy
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        covered.append(sum(plot._overlap(box, other) for other in taken))
        return dx, dy, distance

    monkeypatch.setattr(plot, "_place", watched)
    plot.draw([REFERENCE, *CROWD], tmp_path / "plot.png")
    assert covered == [0] * len(TYPES), "20 models, of which two share a label"


def test_what_models_are_called() -> None:
    assert plot._labels(CROWD) == [*TYPES, *TYPES]
    assert plot._labels([row("a", "Q8_0", 1, 1), row("b", "Q8_0", 1, 1, mmproj="Q8_0")]) == [
        "Q8_0 + F16",
        "Q8_0 + Q8_0",
    ]
    same = [row(f"/models/tuned-{i}.gguf", "Q4_K_M", 4, 1) for i in range(3)]
    assert plot._labels(same) == ["0", "1", "2"]
    assert plot._labels([row("/m/x", "", 1, 1)]) == ["/m/x"]
    assert plot._labels([replace(REFERENCE, model="y" * 200, quant="")]) == ["..." + "y" * 45]


def test_a_plot_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.png").touch()
    (tmp_path / "directory.png").mkdir()
    for name, force, error, message in (
        ("plot.pdf", False, UsageError, "a plot is a .png or a .svg file"),
        ("plot", False, UsageError, "a plot is a"),
        ("there.png", False, OutputError, "exists already; --force replaces it"),
        ("directory.png", True, OutputError, "exists already"),
        ("no/plot.png", False, OutputError, "no such directory"),
    ):
        with pytest.raises(error, match=message):
            plot.check(tmp_path / name, force)
    plot.check(tmp_path / "there.png", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'local-llava\[plot\]'"):
        plot.check(tmp_path / "plot.png", False)
