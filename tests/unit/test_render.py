"""Conversations as tokens: what is learned, what is shown, what is refused."""

import io
import json
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from tokenizers import Tokenizer
from transformers import CLIPImageProcessorPil

from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.samples import RawSample
from betakd_ray.data.templates import VICUNA_SYSTEM
from betakd_ray.errors import ModelError
from betakd_ray.spec import DataSpec
from betakd_ray.spec.data import TEMPLATES
from tests.tiny import BOS, CHAT_TEMPLATE, EOS, IDS, IMAGE, IMAGE_SIZE, IMAGE_TOKENS, tiny_processor

each_template = pytest.mark.parametrize("template", TEMPLATES)

ONE = (("What is it?\n<image>", "A red circle."),)
MANY = (("<image>\nWhat colour?", "Blue, ünïcode ✓."), ("And now?", "  Still blue "), ("Sure?", "yes"))
TEXT = (("Say yes.", "yes"),)
TWO_IMAGES = (("<image>\n<image>\nSame?", "no"), ("Now? <image>", "yes"))
CONVERSATIONS = {"one": ONE, "many": MANY, "text": TEXT, "two_images": TWO_IMAGES}
each_conversation = pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def png(width=20, height=12, colour=(200, 30, 90)):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def sample(turns, images=None):
    conversation = []
    for question, answer in turns:
        conversation += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if images is None:
        images = [png(colour=(i * 40, 90, 10)) for i in range(sum(q.count(IMAGE) for q, _ in turns))]
    return RawSample(key="k", index=0, id="k", conversation=conversation, images=images)


def renderer(processor, **options):
    return Renderer(processor, DataSpec.model_validate({"train": "/x.tar", **options}))


def reference(turns, template, system=None):
    """Return [(piece of text, learned)] with expanded image tokens, written again from the formats' definitions."""
    pictures = IMAGE * IMAGE_TOKENS
    pieces = []
    if template == "vicuna_v1":
        pieces.append(((VICUNA_SYSTEM if system is None else system) + (" " if system != "" else ""), False))
    if template == "chat" and system:
        pieces.append((f"<|system|>\n{system}\n", False))
    for question, answer in turns:
        count, words = question.count(IMAGE), question.replace(IMAGE, "").strip()
        asked = (pictures + "\n") * count + words
        if template == "plain":
            pieces += [(pictures * count, False), (answer + "\n", True)]
        elif template == "vicuna_v1":
            pieces += [(f"USER: {asked} ASSISTANT: ", False), (answer + EOS, True)]
        else:
            pieces += [(f"<|user|>\n{asked}\n<|assistant|>\n", False), (answer + EOS, True), ("\n", False)]
    return pieces


def learned_by_offsets(tokenizer, pieces):
    """Return (ids, mask), found token by token and character by character."""
    text = "".join(piece for piece, _ in pieces)
    learned = [flag for piece, flag in pieces for _ in piece]
    encoded = tokenizer(text, return_offsets_mapping=True)
    mask = [any(learned[start:end]) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], mask


# ---- what is learned ---------------------------------------------------------------------------------------------


@each_template
@each_conversation
@pytest.mark.parametrize("system", [None, "", "Be short."])
def test_exactly_the_answers_and_what_closes_them_are_learned(processor, template, turns, system):
    rendering = renderer(processor, template=template, system_prompt=system).render(sample(turns))
    ids, mask = learned_by_offsets(processor.tokenizer, reference(turns, template, system))
    assert rendering.input_ids.tolist() == ids
    assert rendering.answer_mask.tolist() == mask
    assert ids[0] == IDS[BOS]
    assert not mask[0]


@pytest.mark.parametrize("template", ["vicuna_v1", "chat"])
@each_conversation
def test_every_answer_is_closed_by_a_learned_eos(processor, template, turns):
    rendering = renderer(processor, template=template).render(sample(turns))
    closes = rendering.input_ids == IDS[EOS]
    assert closes.sum() == len(turns)
    assert rendering.answer_mask[closes].all()
    runs = np.diff(np.concatenate([[0], rendering.answer_mask.astype(int), [0]]))
    starts, ends = np.flatnonzero(runs == 1), np.flatnonzero(runs == -1)
    answers = [processor.tokenizer.decode(rendering.input_ids[s:e]).strip() for s, e in zip(starts, ends, strict=True)]
    assert answers == [(answer + EOS).strip() for _, answer in turns]


@each_template
@each_conversation
def test_image_tokens_are_expanded_and_never_answers(processor, template, turns):
    rendering = renderer(processor, template=template).render(sample(turns))
    images = sum(question.count(IMAGE) for question, _ in turns)
    at_image = rendering.input_ids == IDS[IMAGE]
    assert at_image.sum() == images * IMAGE_TOKENS
    assert not rendering.answer_mask[at_image].any()
    if images:
        assert rendering.pixels is not None
        assert rendering.pixels.shape == (images, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert rendering.pixels.dtype == np.uint8
    else:
        assert rendering.pixels is None


def test_images_keep_their_order(processor):
    made = [png(16, 16, (10 * i, 0, 0)) for i in range(1, 4)]
    pixels = renderer(processor).render(sample(TWO_IMAGES, made)).pixels
    assert pixels[:, 0, 8, 8].tolist() == [10, 20, 30]


@each_template
@each_conversation
def test_a_prompt_is_the_beginning_of_the_whole(processor, template, turns):
    view = renderer(processor, template=template)
    prompt, whole = view.prompt(sample(turns)), view.render(sample(turns))
    count = len(prompt.input_ids)
    assert prompt.input_ids.tolist() == whole.input_ids[:count].tolist()
    pieces = reference(turns, template)
    last = max(i for i, (_, learned) in enumerate(pieces) if learned)
    only_last = [(piece, i == last) for i, (piece, _) in enumerate(pieces)]
    assert count == learned_by_offsets(processor.tokenizer, only_last)[1].index(True)
    assert (prompt.pixels is None) == (whole.pixels is None)


def test_a_system_prompt_replaces_the_template_s_own(processor):
    texts = {
        system: processor.tokenizer.decode(renderer(processor, system_prompt=system).render(sample(TEXT)).input_ids)
        for system in (None, "", "Be short.")
    }
    assert texts[None].startswith(f"{BOS}{VICUNA_SYSTEM} USER: ")
    assert texts[""].startswith(f"{BOS}USER: ")
    assert texts["Be short."].startswith(f"{BOS}Be short. USER: ")


def test_a_template_that_writes_bos_itself_gets_one(processor):
    other = tiny_processor(chat_template="{{ '<s>' }}" + CHAT_TEMPLATE)
    ids = renderer(other, template="chat").render(sample(MANY)).input_ids
    assert (ids == IDS[BOS]).sum() == 1


# ---- what is cut, what is refused --------------------------------------------------------------------------------


def test_truncation_keeps_whatever_answers_fit(processor):
    whole = renderer(processor).render(sample(MANY))
    first = int(np.flatnonzero(whole.answer_mask)[0])
    for length in (first + 1, first + 3, len(whole.input_ids) - 1, len(whole.input_ids), 2048):
        cut = renderer(processor, max_length=length).render(sample(MANY))
        assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
        assert cut.answer_mask.tolist() == whole.answer_mask[:length].tolist()
    with pytest.raises(Unrenderable, match=f"no answer token within max_length {first}"):
        renderer(processor, max_length=first).render(sample(MANY))


def test_a_cut_through_an_image_is_refused(processor):
    whole = renderer(processor).render(sample(TWO_IMAGES))
    last_image = int(np.flatnonzero(whole.input_ids == IDS[IMAGE])[-1])
    with pytest.raises(Unrenderable, match="image tokens beyond max_length"):
        renderer(processor, max_length=last_image).render(sample(TWO_IMAGES))


def test_a_prompt_is_never_cut(processor):
    short = renderer(processor, max_length=8)
    assert len(short.prompt(sample(MANY)).input_ids) > 8


@pytest.mark.parametrize("data", [b"", b"not an image", png()[:60]], ids=["empty", "text", "truncated"])
def test_an_image_that_cannot_be_decoded_is_refused(processor, data):
    with pytest.raises(Unrenderable, match="cannot be decoded"):
        renderer(processor).render(sample(ONE, [data]))


def test_too_many_pixels_are_refused_before_they_are_decoded(processor):
    with pytest.raises(Unrenderable, match="20×12 exceeds"):
        renderer(processor, max_image_pixels=239, pad_to_square=False).render(sample(ONE))
    renderer(processor, max_image_pixels=240, pad_to_square=False).render(sample(ONE))


def test_a_thin_image_counts_as_the_square_it_is_padded_to(processor):
    thin = [png(2000, 1)]
    with pytest.raises(Unrenderable, match=r"2000×1 \(padded to a square\) exceeds"):
        renderer(processor, max_image_pixels=10_000).render(sample(ONE, thin))


@pytest.mark.parametrize("method", ["render", "prompt"])
@pytest.mark.parametrize("images", [0, 2])
def test_placeholders_and_images_must_be_as_many(processor, method, images):
    with pytest.raises(Unrenderable, match=f"1 <image> placeholders, but {images} images"):
        getattr(renderer(processor), method)(sample(ONE, [png()] * images))


@pytest.mark.parametrize("method", ["render", "prompt"])
@each_template
def test_a_placeholder_in_an_answer_is_refused(processor, template, method):
    with pytest.raises(Unrenderable, match="is in an answer"):
        getattr(renderer(processor, template=template), method)(sample([("Draw.", "<image>")], [png()]))


def test_of_a_chat_template_that_rewrites_earlier_turns_only_what_stands_as_written_is_learned():
    rewriting = tiny_processor(chat_template="{% if messages|length > 4 %}!{% endif %}" + CHAT_TEMPLATE)
    whole = renderer(rewriting, template="chat").render(sample(MANY))
    assert rewriting.tokenizer.decode(whole.input_ids[whole.answer_mask]) == "yes" + EOS
    assert "Still blue" in rewriting.tokenizer.decode(whole.input_ids)


def test_a_chat_template_that_changes_the_prompt_of_an_answer_is_refused():
    changing = tiny_processor(chat_template="{% if not add_generation_prompt %}!{% endif %}" + CHAT_TEMPLATE)
    with pytest.raises(ModelError, match="changes the prompt when an answer is added"):
        renderer(changing, template="chat")


REFUSING = "{% if 'it' in messages[0].content %}{{ raise_exception('no questions') }}{% endif %}" + CHAT_TEMPLATE


@pytest.mark.parametrize("method", ["render", "prompt"])
def test_a_conversation_that_a_chat_template_refuses_is_refused(method):
    view = renderer(tiny_processor(chat_template=REFUSING), template="chat")
    with pytest.raises(Unrenderable, match="refuses the conversation: no questions"):
        getattr(view, method)(sample(ONE))


@pytest.mark.parametrize("method", ["render", "prompt"])
@pytest.mark.parametrize("later", [(), ONE], ids=["alone", "before a question"])
@each_template
def test_an_answer_without_a_question_is_refused(processor, template, later, method):
    asked = sample(later)
    asked.conversation.insert(0, {"from": "gpt", "value": "Hello."})
    with pytest.raises(Unrenderable, match="first turn is from gpt"):
        getattr(renderer(processor, template=template), method)(asked)


@each_template
def test_a_question_without_an_answer_is_never_learned(processor, template):
    asked = sample(MANY)
    asked.conversation.append({"from": "human", "value": "And then?"})
    view = renderer(processor, template=template)
    rendering, before = view.render(asked), view.render(sample(MANY))
    count = len(before.input_ids)
    assert rendering.input_ids[:count].tolist() == before.input_ids.tolist()
    assert rendering.answer_mask[:count].tolist() == before.answer_mask.tolist()
    assert not rendering.answer_mask[count:].any()


def test_a_plain_prompt_is_the_image_s_tokens_alone(processor):
    prompt = renderer(processor, template="plain").prompt(sample(ONE))
    assert prompt.input_ids.tolist() == [IDS[BOS], *[IDS[IMAGE]] * IMAGE_TOKENS]
    assert not prompt.answer_mask.any()
    assert prompt.pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


def test_a_plain_prompt_of_nothing_is_refused(processor):
    assert renderer(processor, template="plain").prompt(sample(TEXT)).input_ids.tolist() == [IDS[BOS]]
    without_bos = changed("post_processor", lambda _: None)
    with pytest.raises(Unrenderable, match="the prompt is empty"):
        renderer(without_bos, template="plain").prompt(sample(TEXT))


# ---- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(16, 8), (8, 16)])
def test_padding_to_a_square_is_centred_and_has_the_mean_colour(processor, width, height):
    pixels = renderer(processor).render(sample(ONE, [png(width, height, (255, 255, 255))])).pixels[0]
    image = pixels if width > height else pixels.transpose(0, 2, 1)
    mean = [int(255 * channel) for channel in processor.image_processor.image_mean]
    for row in (0, 1, 2, 3, 12, 13, 14, 15):
        assert image[:, row].T.tolist() == [mean] * 16
    assert (image[:, 4:12] == 255).all()


def test_without_padding_the_image_fills_its_square(processor):
    image = [png(32, 16, (255, 255, 255))]
    pixels = renderer(processor, pad_to_square=False).render(sample(ONE, image)).pixels
    assert (pixels == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_every_kind_of_image_becomes_rgb(processor, mode):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (10, 20, 30)).convert(mode).save(buffer, "TIFF")
    assert renderer(processor).render(sample(ONE, [buffer.getvalue()])).pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def first_pixel(processor, data, **options):
    return renderer(processor, **options).render(sample(ONE, [data])).pixels[0, :, 0, 0].tolist()


COLOUR = (10, 20, 30)
GREY_16 = np.full((16, 16), 30_000, np.uint16)
TURNED = Image.new("RGB", (16, 16), COLOUR)
TURNED.paste((200, 0, 0), (8, 0, 16, 16))
EXIF = Image.Exif()
EXIF[0x0112] = 3  # upside down
ANIMATED = {"save_all": True, "append_images": [Image.new("RGB", (16, 16), (0, 200, 0))]}
IMAGES = {
    "RGBA, wholly transparent": (saved(Image.new("RGBA", (16, 16), (*COLOUR, 0))), COLOUR),
    "grey with alpha": (saved(Image.new("LA", (16, 16), (77, 0))), (77, 77, 77)),
    "black and white": (saved(Image.new("1", (16, 16), 1)), (255, 255, 255)),
    "palette": (saved(Image.new("RGB", (16, 16), COLOUR).quantize(4)), COLOUR),
    "CMYK": (saved(Image.new("CMYK", (16, 16), (10, 20, 30, 0)), "TIFF"), (245, 235, 225)),
    "16-bit grey": (saved(Image.fromarray(GREY_16)), (117, 117, 117)),
    "16-bit grey, the other byte order": (saved(Image.fromarray(GREY_16.astype(">u2")), "TIFF"), (117, 117, 117)),
    "animated PNG": (saved(Image.new("RGB", (16, 16), COLOUR), **ANIMATED), COLOUR),
    "animated WebP": (saved(Image.new("RGB", (16, 16), COLOUR), "WEBP", lossless=True, **ANIMATED), COLOUR),
    "a GIF by another name": (saved(Image.new("RGB", (16, 16), COLOUR), "GIF"), COLOUR),
    "EXIF that says upside down": (saved(TURNED, exif=EXIF), COLOUR),
}


@pytest.mark.parametrize("case", IMAGES)
def test_an_image_has_the_colour_that_is_stored_in_its_first_frame(processor, case):
    data, colour = IMAGES[case]
    assert first_pixel(processor, data) == list(colour)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_numbers_without_a_scale_are_refused_and_not_clipped(processor, dtype):
    data = saved(Image.fromarray(np.full((16, 16), 0.5).astype(dtype)), "TIFF")
    with pytest.raises(Unrenderable, match="no known scale"):
        renderer(processor).render(sample(ONE, [data]))


def test_a_postscript_image_is_refused_and_starts_no_ghostscript(processor, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    with pytest.raises(Unrenderable, match="cannot be decoded"):
        renderer(processor).render(sample(ONE, [saved(Image.new("RGB", (16, 16)), "EPS")]))


def declaring(width, height, extra=b""):
    """Return a PNG of some hundred bytes whose header declares this size in pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(16 * (1 + 3 * 16))))  # of 16×16 pixels
    return b"\x89PNG\r\n\x1a\n" + header + extra + rows + chunk(b"IEND", b"")


def test_the_png_that_declares_a_size_is_one(processor):
    assert first_pixel(processor, declaring(16, 16)) == [0, 0, 0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("side", [12_000, 50_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused_before_it_takes_memory(processor, side, pad):
    bomb = declaring(side, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Unrenderable, match=r"exceeds data\.max_image_pixels|decompression bomb|cannot be decoded"):
        renderer(processor, pad_to_square=pad).render(sample(ONE, [bomb]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_bomb_in_a_text_of_a_png_is_refused(processor):
    content = b"Comment\0\0" + zlib.compress(bytes(100 << 20))
    chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
    with pytest.raises(Unrenderable, match="cannot be decoded"):
        renderer(processor).render(sample(ONE, [declaring(16, 16, chunk)]))


def test_a_strip_of_30_000_pixels_is_refused_where_it_would_be_padded(processor):
    with pytest.raises(Unrenderable, match=r"30000×10 \(padded to a square\) exceeds data\.max_image_pixels"):
        renderer(processor).render(sample(ONE, [png(30_000, 10)]))
    assert renderer(processor, pad_to_square=False).render(sample(ONE, [png(30_000, 10)])).pixels is not None


@pytest.mark.parametrize(("width", "height"), [(30_000, 10), (10, 30_000)])
def test_a_strip_counts_as_what_it_is_scaled_up_to(width, height):
    processor = tiny_processor()
    processor.image_processor.size = {"shortest_edge": 336}
    strip = sample(ONE, [png(width, height)])
    with pytest.raises(Unrenderable, match=r"scaled to a shortest edge of 336\) exceeds data\.max_image_pixels"):
        renderer(processor, pad_to_square=False).render(strip)


# ---- a renderer's identity ---------------------------------------------------------------------------------------


@each_template
def test_equal_renderers_have_equal_fingerprints(template):
    assert renderer(tiny_processor(), template=template).fingerprint == (
        renderer(tiny_processor(), template=template).fingerprint
    )


def test_renderers_that_differ_have_fingerprints_that_differ(processor):
    views = [
        renderer(processor),
        renderer(processor, template="plain"),
        renderer(processor, template="chat"),
        renderer(processor, system_prompt=""),
        renderer(processor, max_length=512),
        renderer(processor, pad_to_square=False),
        renderer(processor, max_image_pixels=10_000),
        renderer(tiny_processor(image_size=32)),
    ]
    assert len({view.fingerprint for view in views}) == len(views)


def changed(part, change):
    """Return a processor whose tokenizer has another setting in its tokenizer.json."""
    processor = tiny_processor()
    content = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    content[part] = change(content[part])
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return processor


class OtherBackend(CLIPImageProcessorPil):
    def to_dict(self):
        return {**super().to_dict(), "image_processor_type": "CLIPImageProcessor"}


def other_backend():
    processor = tiny_processor()
    same = {name: getattr(processor.image_processor, name) for name in ("size", "crop_size")}
    processor.image_processor = OtherBackend(**same)
    assert processor.image_processor.to_dict() == tiny_processor().image_processor.to_dict()
    return processor


def given(**attributes):
    processor = tiny_processor()
    for name, value in attributes.items():
        setattr(processor.image_processor if name == "image_mean" else processor.tokenizer, name, value)
    return processor


OTHERS = {
    "merges": lambda: changed("model", lambda model: {**model, "merges": model["merges"][:-1]}),
    "normalizer": lambda: changed("normalizer", lambda _: {"type": "Lowercase"}),
    "pre_tokenizer": lambda: changed("pre_tokenizer", lambda before: {**before, "add_prefix_space": True}),
    "an added token": lambda: changed("added_tokens", lambda tokens: [*tokens[:-1], {**tokens[-1], "lstrip": True}]),
    "eos token": lambda: given(eos_token="<unk>"),
    "special tokens taken apart": lambda: given(split_special_tokens=True),
    "image mean": lambda: given(image_mean=(0.1, 0.2, 0.3)),
    "an image processor on another backend": other_backend,
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_fingerprint_covers_what_the_probe_does_not_show(processor, name):
    assert renderer(OTHERS[name]()).fingerprint != renderer(processor).fingerprint


def test_chat_templates_that_differ_only_later_have_fingerprints_that_differ(processor):
    later = tiny_processor(chat_template=CHAT_TEMPLATE + "{% if messages|length > 4 %}!{% endif %}")
    assert renderer(later, template="chat").fingerprint != renderer(processor, template="chat").fingerprint
    assert renderer(later).fingerprint == renderer(processor).fingerprint


def test_a_fingerprint_does_not_depend_on_earlier_use_or_on_padding(processor):
    used = given(pad_token="<unk>")
    used.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=8)
    assert renderer(used).fingerprint == renderer(processor).fingerprint


@each_template
def test_an_image_s_tokens_are_counted_whatever_the_length(processor, template):
    short = renderer(processor, template=template, max_length=8)
    assert set(short.image_tokens) == {IMAGE_TOKENS}
    assert short.fingerprint


def test_padding_falls_back_on_eos():
    processor = tiny_processor()
    assert renderer(processor).pad_token_id == IDS["<pad>"]
    processor.tokenizer.pad_token = None
    assert renderer(processor).pad_token_id == IDS[EOS]


def test_a_processor_that_lacks_something_is_refused():
    processor = tiny_processor(chat_template=None)
    with pytest.raises(ModelError, match="no chat template"):
        renderer(processor, template="chat")
    processor.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no eos token"):
        renderer(processor)
