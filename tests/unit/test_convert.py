"""Checkpoints in their authors' layouts, read and written: the logits stay, and nothing is guessed."""

import errno
import io
import json
import os
import pickle
import shutil

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)
from typer.testing import CliRunner

from betakd_ray.batch.normalization import Normalization
from betakd_ray.cli import app
from betakd_ray.data.render import Renderer
from betakd_ray.errors import ModelError, OutputError
from betakd_ray.models import export
from betakd_ray.models.assemble import with_row
from betakd_ray.models.convert import convert
from betakd_ray.models.export import export_mobilevlm
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.mobilevlm import MobileVLMForConditionalGeneration
from betakd_ray.spec import DataSpec, ModelSpec
from tests.originals import (
    FACTORY_NAMES,
    FLAT_NAMES,
    LDPV2_NAMES,
    MLP_NAMES,
    flat_config,
    mobilevlm,
    mobilevlm_config,
    original_names,
    plain_tokenizer,
    with_large_weights,
    write,
    write_tower,
)
from tests.tiny import IDS, IMAGE, raw_sample, tiny_model

VOCAB = len(plain_tokenizer())


def llava(vocab=VOCAB):
    return with_large_weights(tiny_model(vocab=vocab))


def original_mobilevlm(vocab=VOCAB):
    """Return a model with the published sizes of images: 24×24 patches, 144 tokens."""
    return mobilevlm(mobilevlm_config(side=12, pixels=96, patch=4, vocab=vocab))


def write_llava(root, model=None, *, tower_inside=False, shards=1, **fields):
    model = model or llava()
    state = {k: w for k, w in model.state_dict().items() if tower_inside or not k.startswith("model.vision_tower.")}
    tower = write_tower(root / "clip", model)
    return write(
        root / "original",
        flat_config(model, tower, **fields),
        original_names(state, FLAT_NAMES, MLP_NAMES),
        shards=shards,
    )


def write_mobilevlm(root, model=None, **fields):
    """Write a MobileVLM whose own tower differs from the separate one."""
    model = model or original_mobilevlm()
    tower = write_tower(root / "clip", mobilevlm(model.config, seed=9))
    mobile = {
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "mm_projector_type": "ldpnetv2",
        "vision_tower_type": "clip",
    }
    weights = original_names(model.state_dict(), FLAT_NAMES, LDPV2_NAMES)
    folder = write(root / "original", flat_config(model, tower, **{**mobile, **fields}), weights)
    (folder / "tokenizer.model").write_bytes(b"as the original tool chain reads it")
    return folder


def logits_of(model):
    """Return the logits of one image and a few tokens; the image token is the one of the model."""
    config = model.config
    count = config.image_seq_length
    ids = [1, 40, *[config.image_token_id] * count, 50, 60, 70]
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]


def assert_same_logits(converted, model):
    expected = logits_of(model)
    found = logits_of(converted)
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert expected.abs().max() > 1


def loaded(folder):
    return load_model(ModelSpec(path=str(folder)))


# ---- the logits stay -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower_inside", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_original_llava_has_the_logits_of_the_model_it_was_made_from(tmp_path, tower_inside, shards):
    model = llava()
    convert(str(write_llava(tmp_path, model, tower_inside=tower_inside, shards=shards)), tmp_path / "new")
    converted = loaded(tmp_path / "new")
    assert type(converted) is LlavaForConditionalGeneration
    assert_same_logits(converted, model)


def test_an_original_mobilevlm_has_the_logits_of_the_model_it_was_made_from(tmp_path):
    model = original_mobilevlm()
    convert(str(write_mobilevlm(tmp_path, model)), tmp_path / "new")
    converted = loaded(tmp_path / "new")
    assert isinstance(converted, MobileVLMForConditionalGeneration)
    assert_same_logits(converted, model)


def test_a_mobilevlm_exported_and_read_again_has_the_same_logits_and_the_same_file(tmp_path):
    model, original = original_mobilevlm(), write_mobilevlm(tmp_path)
    convert(str(original), tmp_path / "new")
    export_mobilevlm(str(tmp_path / "new"), tmp_path / "back", str(original))
    first, second = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "back"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (original, tmp_path / "back"))
    written = set(after) & set(before)
    assert {name: after[name] for name in written} == {name: before[name] for name in written} | {
        "torch_dtype": "float32"
    }
    assert set(before) - set(after) == {"image_grid_pinpoints", "transformers_version"}
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (original / "tokenizer.model").read_bytes()
    plain_tokenizer().save_pretrained(tmp_path / "back")
    convert(str(tmp_path / "back"), tmp_path / "again")
    assert_same_logits(loaded(tmp_path / "again"), model)


def factory(vision, *, tied):
    """Return TinyLLaVA Factory's model of Qwen2 with SigLIP."""
    text = Qwen2Config(
        vocab_size=400,  # padded, as Qwen's are
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    common = {"image_token_index": IDS[IMAGE], "tie_word_embeddings": tied}
    config = LlavaConfig(vision_config=vision, text_config=text, image_seq_length=8, **common)
    return with_large_weights(LlavaForConditionalGeneration(config).eval())


def siglip():
    return SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8
    )


def write_siglip(folder, vision):
    vision.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_tinyllava_of_the_factory_has_the_logits_of_the_model_it_was_made_from(tmp_path, tied):
    vision = siglip()
    model = factory(vision, tied=tied)
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    config = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "text_config": model.config.text_config.to_dict(),
        "vision_config": vision.to_dict(),
        "vision_model_name_or_path": str(write_siglip(tmp_path / "siglip", vision)),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
    }
    source = write(tmp_path / "original", config, original_names(state, FACTORY_NAMES, MLP_NAMES))
    convert(str(source), tmp_path / "new")
    converted = loaded(tmp_path / "new")
    assert converted.config.image_seq_length == 8  # its code drops a first token, of 9 patches
    assert_same_logits(converted, model)
    assert (converted.lm_head.weight is converted.get_input_embeddings().weight) is tied


def test_siglip_keeps_all_its_patches_in_the_flat_layout(tmp_path):
    vision = siglip()
    model = factory(vision, tied=False)
    model.config.vision_feature_select_strategy, model.config.image_seq_length = "full", 9
    tower = write_siglip(tmp_path / "siglip", vision)
    fields = {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen"}
    weights = original_names(model.state_dict(), FLAT_NAMES, MLP_NAMES)
    convert(str(write(tmp_path / "original", flat_config(model, tower, **fields), weights)), tmp_path / "new")
    assert_same_logits(loaded(tmp_path / "new"), model)


@pytest.mark.parametrize("write_original", [write_llava, write_mobilevlm])
def test_a_converted_folder_renders_as_many_image_tokens_as_the_model_makes(tmp_path, write_original):
    convert(str(write_original(tmp_path)), tmp_path / "new")
    processor = load_processor(ModelSpec(path=str(tmp_path / "new")))
    renderer = Renderer(processor, DataSpec(train=("unused",)))
    one = renderer.render(raw_sample(1, "yes", has_image=True))
    assert one.pixels is not None
    pixels = Normalization.of(renderer.image_processor)(torch.from_numpy(one.pixels), torch.float32)
    with torch.no_grad():
        out = loaded(tmp_path / "new")(input_ids=torch.from_numpy(one.input_ids).long()[None], pixel_values=pixels)
    assert out.logits.isfinite().all()


def test_weights_become_of_the_language_model_s_type(tmp_path):
    source = write_llava(tmp_path)
    half = {name: weight.half() for name, weight in load_file(source / "model.safetensors").items()}
    save_file(half, source / "model.safetensors")
    convert(str(source), tmp_path / "new")
    assert {weight.dtype for weight in load_file(tmp_path / "new" / "model.safetensors").values()} == {torch.float16}
    assert loaded(tmp_path / "new").dtype == torch.float16


# ---- the vocabulary ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "rows"), [(VOCAB, 448), (VOCAB + 1, VOCAB + 1), (VOCAB + 20, VOCAB + 20)])
def test_the_image_token_has_the_first_free_id_and_the_vocabulary_grows_only_for_want_of_a_row(tmp_path, vocab, rows):
    convert(str(write_llava(tmp_path, llava(vocab))), tmp_path / "new")
    converted = loaded(tmp_path / "new")
    processor = load_processor(ModelSpec(path=str(tmp_path / "new")))
    assert processor.image_token_id == converted.config.image_token_id == VOCAB
    assert converted.lm_head.weight.shape[0] == converted.config.text_config.vocab_size == rows
    text = "USER: Which? ASSISTANT: The left."
    assert processor.tokenizer(text).input_ids == plain_tokenizer()(text).input_ids
    assert processor.tokenizer(f"a{IMAGE}b").input_ids.count(VOCAB) == 1


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), vocab=st.integers(2, 200), scale=st.floats(0.01, 30))
def test_no_new_id_is_the_likeliest_or_more_likely_than_one_in_the_vocabulary(seed, vocab, scale):
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocab, 8, generator=generator)
    hidden = scale * torch.randn(5, 8, generator=generator)
    grown = with_row(head, vocab)
    assert len(grown) % 64 == 0
    assert torch.equal(grown[:vocab], head)
    logits = hidden @ grown.T
    assert (logits.softmax(1)[:, vocab:] <= 1 / vocab * 1.0001).all()
    assert (logits[:, vocab:].amax(1) <= logits[:, :vocab].amax(1) + 1e-4 * scale).all()


def sentencepiece_model():
    """Return a sentencepiece model like LLaMA's, and its bytes."""
    written = io.BytesIO()
    text = ["USER: What is in the image? ASSISTANT: A red circle on the left.", "USER: Which color? ASSISTANT: blue"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_writer=written, vocab_size=VOCAB, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()), written.getvalue()


def test_a_sentencepiece_model_splits_the_text_around_special_tokens_as_the_original_code_does(tmp_path):
    pieces, content = sentencepiece_model()
    source = write_mobilevlm(tmp_path, original_mobilevlm(vocab=pieces.vocab_size()))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(content)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(str(source), tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    before, after, more = "A chat. USER: ", "\nWhich color? ASSISTANT: blue", "USER: And now?"
    expected = [1, *pieces.encode(before), pieces.vocab_size(), *pieces.encode(after), 2, *pieces.encode(more)]
    assert tokenizer(f"{before}{IMAGE}{after}</s>{more}").input_ids == expected


# ---- what is refused -----------------------------------------------------------------------------------------------


def pickled(folder, weights):
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_a_pickle_is_read_only_when_that_is_asked_for(tmp_path):
    model = llava()
    source = write_llava(tmp_path, model)
    pickled(source, load_file(source / "model.safetensors"))
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: the weights are in a pickle. Give --allow-pickle"):
        convert(str(source), tmp_path / "new")
    convert(str(source), tmp_path / "new", allow_pickle=True)
    assert_same_logits(loaded(tmp_path / "new"), model)


class Mine:
    """Object whose pickle asks for a call on loading: it creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_pickle_that_asks_for_more_than_tensors_is_not_obeyed(tmp_path):
    source = write_llava(tmp_path)
    pickled(source, {"model.norm.weight": Mine(tmp_path / "ran")})
    with pytest.raises(ModelError, match="holds more than tensors, so it was not read"):
        convert(str(source), tmp_path / "new", allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Mine(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mm_projector_type": "ldpnet"}, "the projector is 'ldpnet'; the known ones are mlp2x_gelu, ldpnetv2"),
        ({"mm_projector_type": "linear"}, "the projector is 'linear'"),
        (
            {"mm_vision_select_feature": "slicefour"},
            "the selected feature is 'slicefour'; the known ones are patch, cls_patch",
        ),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is true"),
        ({"image_aspect_ratio": "anyres_max_9"}, r"image_aspect_ratio is anyres \(LLaVA-NeXT\)"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "'LlavaMptForCausalLM'; the known ones are Llama, Mistral, Qwen"),
        ({"mm_vision_tower": None}, "mm_vision_tower is missing"),
        ({"mm_vision_tower": "not/there/at/all"}, "not/there/at/all: is not a folder.*give --vision-tower"),
        ({"hidden_size": 32}, "the weights do not fit the configuration"),
        ({"num_hidden_layers": 3}, r"weights that are missing: model.language_model.layers.2.\S+ and 8 more"),
        ({"num_hidden_layers": 1}, r"weights that it does not have: model.language_model.layers.1.\S+ and 8 more"),
        ({"text_config": {}}, "is not known here"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(tmp_path, fields, said):
    source = write_llava(tmp_path, **fields)
    with pytest.raises(ModelError, match=said):
        convert(str(source), tmp_path / "new")
    assert [path for path in tmp_path.iterdir() if path.name.startswith("new")] == []


def test_a_weight_by_an_unknown_name_is_refused(tmp_path):
    source = write_llava(tmp_path)
    save_file(
        {**load_file(source / "model.safetensors"), "adapter.weight": torch.ones(1)}, source / "model.safetensors"
    )
    with pytest.raises(ModelError, match=r"weights with unknown names: adapter\.weight"):
        convert(str(source), tmp_path / "new")


def test_a_projector_alone_is_no_checkpoint(tmp_path):
    source = write_llava(tmp_path)
    projector = {n: w for n, w in load_file(source / "model.safetensors").items() if "mm_projector" in n}
    save_file(projector, source / "model.safetensors")
    with pytest.raises(ModelError, match="has no weights of a language model"):
        convert(str(source), tmp_path / "new")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("original/config.json", "does not exist"),
        ("original/model.safetensors", "has no model.safetensors, no pytorch_model.bin, and no index"),
        ("original/tokenizer.json", "has no tokenizer.json and no tokenizer.model"),
        ("clip/config.json", "cannot be read as a vision tower"),
        ("clip/preprocessor_config.json", "cannot be read as a vision tower"),
        ("clip/model.safetensors", "clip: has no model.safetensors"),
    ],
)
def test_a_file_that_is_missing_is_named(tmp_path, missing, said):
    source = write_llava(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ModelError, match=said):
        convert(str(source), tmp_path / "new")


def test_a_vision_tower_of_another_kind_is_refused(tmp_path):
    source = write_llava(tmp_path)
    (tmp_path / "clip" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(
        ModelError, match="is a 'vit'; a vision tower must be one of clip_vision_model, siglip_vision_model"
    ):
        convert(str(source), tmp_path / "new")


def test_a_folder_that_has_something_in_it_is_not_written_to(tmp_path):
    source = write_llava(tmp_path)
    with pytest.raises(OutputError, match="original: exists and is not empty"):
        convert(str(source), source)


FULL = SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (FULL, OutputError, r"new: .*disk is full: free some space in"),
        (KeyboardInterrupt("by hand"), KeyboardInterrupt, "by hand"),
    ],
)
@pytest.mark.parametrize("call", [convert, export_mobilevlm])
def test_a_folder_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch, call, error, raised, said):
    source = write_mobilevlm(tmp_path)
    convert(str(source), tmp_path / "whole")
    before = sorted(tmp_path.iterdir())

    def written_in_part(*arguments, **options):
        raise error

    if call is convert:
        monkeypatch.setattr(LlavaProcessor, "save_pretrained", written_in_part)  # after the model
        arguments = (str(source), tmp_path / "new")
    else:
        monkeypatch.setattr(export, "save_torch_state_dict", written_in_part)  # after the tokenizer
        arguments = (str(tmp_path / "whole"), tmp_path / "new", str(source))
    with pytest.raises(raised, match=said):
        call(*arguments)
    assert sorted(tmp_path.iterdir()) == before


def test_a_vision_tower_that_moved_is_given_by_hand(tmp_path):
    model = llava()
    source = write_llava(tmp_path, model)
    shutil.move(tmp_path / "clip", tmp_path / "moved")
    convert(str(source), tmp_path / "new", vision_tower=str(tmp_path / "moved"))
    assert_same_logits(loaded(tmp_path / "new"), model)


def test_an_original_layout_given_to_training_is_refused_with_the_command_to_run(tmp_path):
    source = write_llava(tmp_path)
    with pytest.raises(ModelError, match=f"betakd convert {source}"):
        loaded(source)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_seq_length": 16}, "image_seq_length is 16; the original code knows only 144"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is full"),
    ],
)
def test_what_the_original_code_cannot_be_told_is_not_exported(tmp_path, change, said):
    source = write_mobilevlm(tmp_path)
    convert(str(source), tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=said):
        export_mobilevlm(str(tmp_path / "new"), tmp_path / "back", str(source))


def test_only_a_mobilevlm_is_exported_and_with_a_tokenizer_that_its_code_reads(tmp_path):
    source = write_llava(tmp_path / "llava")
    convert(str(source), tmp_path / "other")
    with pytest.raises(ModelError, match="is a LlavaForConditionalGeneration; only a MobileVLM"):
        export_mobilevlm(str(tmp_path / "other"), tmp_path / "back", str(source))
    convert(str(write_mobilevlm(tmp_path / "mobilevlm")), tmp_path / "new")
    with pytest.raises(ModelError, match=r"has no tokenizer\.model.*--tokenizer"):
        export_mobilevlm(str(tmp_path / "new"), tmp_path / "back", str(source))


def test_a_vocabulary_with_the_image_token_inside_is_exported_whole(tmp_path):
    original = write_mobilevlm(tmp_path)
    convert(str(original), tmp_path / "new")
    processor = load_processor(ModelSpec(path=str(tmp_path / "new")))
    processor.tokenizer.add_tokens(["<after>"])
    processor.save_pretrained(tmp_path / "new")
    export_mobilevlm(str(tmp_path / "new"), tmp_path / "back", str(original))
    assert load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"].shape[0] == 448


# ---- the commands --------------------------------------------------------------------------------------------------


def test_the_commands_convert_and_export(tmp_path):
    source = write_mobilevlm(tmp_path)
    run = CliRunner().invoke
    assert "MobileVLMForConditionalGeneration" in run(app, ["convert", str(source), str(tmp_path / "new")]).stdout
    back = run(app, ["export", str(tmp_path / "new"), str(tmp_path / "back"), "--tokenizer", str(source)])
    assert back.exit_code == 0
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()
    assert run(app, ["convert", str(source), str(tmp_path / "new")]).exit_code == 2
