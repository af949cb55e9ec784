"""A language model out of one GGUF, as teacher and as student."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from betakd_ray.batch.packing import stack
from betakd_ray.data.pack import pack
from betakd_ray.data.render import Renderer
from betakd_ray.errors import ModelError
from betakd_ray.forecast.forecast import forecast
from betakd_ray.job import BetaKDJob
from betakd_ray.models.compatibility import check_vocabularies
from betakd_ray.models.load import load_config, load_model, load_processor
from betakd_ray.models.student import build_student, student_processor
from betakd_ray.spec import DataSpec, JobSpec, ModelSpec, StudentSpec, TeacherSpec, parse_spec
from betakd_ray.teacher.answers import to_tensor
from betakd_ray.teacher.parts import Needs
from betakd_ray.teacher.scorer import TeacherScorer
from betakd_ray.train.export import _save
from tests.tiny import BOS, CHAT_TEMPLATE, EOS, PAD, numbered_samples, raw_sample

CPU = torch.device("cpu")
NAME = "tiny-f32.gguf"
SPECIALS = [PAD, BOS, EOS]
TOKENS = [*SPECIALS, *pre_tokenizers.ByteLevel.alphabet(), "es", "yes"]
MERGES = ["e s", "y es"]
HEADS, KV_HEADS = 4, 2
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama(seed: int = 0, *, ties: bool = False) -> LlamaForCausalLM:
    """Return a model with random weights; its rotary base is not the default, so a reader that ignores it fails."""
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=ties,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones, else, wherever they went
                parameter.data = 1 + 0.1 * torch.randn_like(parameter)
        return model


def save_gguf(
    file: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    without: str = "",
    also: dict[str, str] | None = None,
) -> Path:
    """Write a GGUF as llama.cpp's converter does, with its own names, order of rotary rows and metadata.

    Matrices have the type `kind`, the tensor `without` is left out, and `also` has further texts of the metadata.
    """
    config, weights = model.config, {name: each.detach().numpy() for name, each in model.state_dict().items()}
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIALS) + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, text in (also or {}).items():
        writer.add_string(key, text)

    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not config.tie_word_embeddings:
        names["output"] = "lm_head"
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{name}": f"model.layers.{layer}.{own}" for name, own in LAYER.items()}
    for name, own in names.items():
        array = weights[f"{own}.weight"]
        if name.endswith("attn_q"):
            array = _interleaved(array, HEADS)
        if name.endswith("attn_k"):
            array = _interleaved(array, KV_HEADS)
        if name == without:
            continue
        if array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of each head, because llama.cpp rotates pairs of neighbouring rows."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    save_gguf(folder / NAME, llama())
    return folder


@pytest.fixture(scope="module")
def batch(folder):
    renderer = Renderer(load_processor(model_spec(folder)), DataSpec(train=("/unused.tar",)))
    samples = [raw_sample(number, answer, has_image=False) for number, answer in enumerate(["yes", "It is so.", "no"])]
    return stack([renderer.render(sample) for sample in samples], renderer.pad_token_id, renderer.image_token_id)


def model_spec(folder: Path, kind: type[ModelSpec] = ModelSpec, **fields: Any) -> Any:
    return kind(path=str(folder), **{"gguf_file": NAME, **fields})


def student_spec(folder: Path, **fields: Any) -> StudentSpec:
    init = {"kind": "checkpoint", "path": str(folder), "gguf_file": NAME}
    return StudentSpec.model_validate({"init": init, **fields})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 60).reshape(3, 19)).logits


@pytest.mark.parametrize("ties", [False, True])
def test_logits_are_those_of_the_weights_that_were_written(tmp_path, ties):
    save_gguf(tmp_path / NAME, llama(ties=ties))
    model = load_model(model_spec(tmp_path), torch.float32)
    torch.testing.assert_close(logits(model), logits(llama(ties=ties)), rtol=1e-5, atol=1e-5)
    assert model.config.tie_word_embeddings == ties
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_packed_weights_are_unpacked(tmp_path):
    original = llama()
    save_gguf(tmp_path / NAME, original, kind=gguf.GGMLQuantizationType.Q8_0)
    model = load_model(model_spec(tmp_path), torch.float32)
    found, expected = (each.model.layers[1].mlp.up_proj.weight.detach() for each in (model, original))
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=float(expected.abs().max()) / 127)
    half = load_model(model_spec(tmp_path), torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_tokenizer_is_the_file_s(folder):
    tokenizer = load_processor(model_spec(folder))
    assert tokenizer.encode("yes!") == [1, TOKENS.index("yes"), TOKENS.index("!")]
    assert tokenizer.decode(tokenizer.encode("yes! É"), skip_special_tokens=True) == "yes! É"
    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, EOS)
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_a_file_of_that_name_in_the_working_directory_is_not_read(folder, tmp_path, monkeypatch):
    save_gguf(tmp_path / NAME, llama(seed=1))
    monkeypatch.chdir(tmp_path)
    torch.testing.assert_close(logits(load_model(model_spec(folder))), logits(llama()), rtol=1e-5, atol=1e-5)


def test_of_a_url_only_that_file_is_fetched(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BETAKD_CACHE", str(tmp_path / "cache"))
    (folder / "other.gguf").write_bytes(b"of another size")
    spec = ModelSpec(path=f"file://{folder}", gguf_file=NAME)
    torch.testing.assert_close(logits(load_model(spec)), logits(llama()), rtol=1e-5, atol=1e-5)
    assert [file.name for file in (tmp_path / "cache").rglob("*.gguf")] == [NAME]


def test_a_student_is_saved_as_a_plain_folder(folder, tmp_path):
    spec = student_spec(folder)
    model = build_student(spec, torch.float32)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.lm_head.weight += 0.01
    _save(model, model.state_dict(), spec, str(tmp_path))
    student_processor(spec).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.gguf"))
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = load_model(ModelSpec(path=str(tmp_path)), torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    saved, own = load_processor(ModelSpec(path=str(tmp_path))), student_processor(spec)
    check_vocabularies(saved, own)
    data = DataSpec(train=("/unused.tar",), template="chat")
    assert Renderer(saved, data).fingerprint == Renderer(own, data).fingerprint


def test_a_student_learns_by_adapters_and_is_saved_with_them(folder, tmp_path):
    spec = student_spec(folder, lora={"r": 2})
    model = build_student(spec, torch.float32)
    _save(model, model.state_dict(), spec, str(tmp_path))
    again = load_model(ModelSpec(path=str(tmp_path)), torch.float32)
    torch.testing.assert_close(logits(again), logits(llama()), rtol=1e-5, atol=1e-5)


def test_a_teacher_answers_with_it(folder, batch):
    teacher = TeacherScorer(model_spec(folder, TeacherSpec), Needs(frozenset({"hidden"})))
    answer, head = teacher.score(batch), teacher.head()
    assert answer.is_finite.all()
    assert head is not None
    found = to_tensor(answer.arrays["hidden"], CPU) @ to_tensor(head, CPU).t()
    with torch.no_grad():
        whole = llama()(torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)).logits
    torch.testing.assert_close(found, whole.flatten(0, 1)[batch.answer_rows], rtol=1e-5, atol=1e-5)


def test_a_changed_file_is_another_teacher_to_the_cache(tmp_path):
    def fingerprint(name: str, **options: Any) -> str:
        (tmp_path / name).mkdir()
        save_gguf(tmp_path / name / NAME, llama(options.pop("seed", 0)), **options)
        spec = model_spec(tmp_path / name, TeacherSpec, cache=str(tmp_path))
        return TeacherScorer(spec, Needs(frozenset({"hidden"}))).facts().fingerprint

    first, same, other = fingerprint("first"), fingerprint("same"), fingerprint("other", seed=1)
    packed = fingerprint("packed", kind=gguf.GGMLQuantizationType.Q8_0)
    assert first == same
    assert len({first, other, packed}) == 3


def job(folder: Path, tmp_path: Path, **sections: Any) -> BetaKDJob:
    pack(numbered_samples(8), str(tmp_path / "shards"), samples_per_shard=4)
    model = {"path": str(folder), "gguf_file": NAME}
    tree = {
        "name": "text",
        "data": {"train": str(tmp_path / "shards/*.tar")},
        "teacher": model,
        "student": {"init": {"kind": "checkpoint", **model}},
        "training": {"global_batch_size": 2, "micro_batch_size": 2},
        "objective": {"energies": ["fkl"]},
        "output": {"path": str(tmp_path / "runs")},
    }
    return BetaKDJob(parse_spec(tree | sections, JobSpec))


def test_a_job_of_ggufs_passes_its_checks_and_is_planned(folder, tmp_path):
    of_files = job(folder, tmp_path)
    plan, renderers = of_files.check()
    assert plan.samples == 8
    assert list(renderers) == ["student"]
    found = forecast(of_files)
    count = sum(parameter.numel() for parameter in llama().parameters())
    assert found.teacher
    assert found.teacher.parameters == found.student.parameters == count
    assert found.teacher.weights >= 4 * count  # "auto" is float32, as it loads


def test_a_teacher_of_a_gguf_and_a_student_in_safetensors_share_a_vocabulary(folder, tmp_path):
    llama(seed=2).save_pretrained(tmp_path / "student")
    load_processor(model_spec(folder)).save_pretrained(tmp_path / "student")
    student = {"init": {"kind": "checkpoint", "path": str(tmp_path / "student")}}
    assert list(job(folder, tmp_path, student=student).check()[1]) == ["student"]


# ------------------------------------------------------------------------------------------ what is refused


def broken(content: bytes):
    def write(file: Path) -> None:
        file.write_bytes(content)

    return write


def cut_short(file: Path) -> None:
    content = save_gguf(file, llama()).read_bytes()
    file.write_bytes(content[: len(content) * 3 // 4])


def cut_in_its_header(file: Path) -> None:
    file.write_bytes(save_gguf(file, llama()).read_bytes()[:200])


def of_parts(file: Path) -> None:
    file.write_bytes(_with(save_gguf(file, llama()), "split.count", 3))


def _with(file: Path, key: str, number: int) -> bytes:
    """Return the file's content with an additional number at the beginning of the metadata."""
    content = file.read_bytes()
    version, tensors, keys = struct.unpack_from("<IQQ", content, 4)
    entry = struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", gguf.GGUFValueType.UINT32, number)
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys + 1) + entry + content[24:]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (
            lambda file: save_gguf(file.with_name("other.gguf"), llama()),
            rf"has no {NAME}. Its GGUFs are: other\.gguf",
        ),
        (broken(b""), r"is not a GGUF, or is damaged"),
        (broken(b"PK\x03\x04" + bytes(100)), r"is not a GGUF, or is damaged \(.*magic"),
        (broken(b"GGUF" + struct.pack("<IQQ", 3, 1, 2**40)), r"is not a GGUF, or is damaged"),
        (cut_in_its_header, r"is not a GGUF, or is damaged"),
        (cut_short, rf"AutoConfig cannot load {NAME} \(fetch it again"),
        (of_parts, r"is one of 3 files.*llama-gguf-split --merge"),
        (
            lambda file: save_gguf(file, llama(), architecture="rwkv9"),
            r"name a model in safetensors.*architecture rwkv9 is not supported",
        ),
        (
            lambda file: save_gguf(file, llama(), also={"llama.rope.scaling.type": "linear"}),
            "scales its rotary positions",
        ),
    ],
    ids=["missing", "empty", "zip", "endless", "header", "short", "parts", "architecture", "scaled"],
)
def test_a_file_that_transformers_would_not_read_is_found_before_weights_are(tmp_path, write, said):
    write(tmp_path / NAME)
    with pytest.raises(ModelError, match=rf"{tmp_path}.*{said}"):
        load_config(model_spec(tmp_path))


def test_a_file_without_all_of_the_weights_is_refused(tmp_path):
    save_gguf(tmp_path / NAME, llama(), without="blk.1.ffn_up")
    with pytest.raises(ModelError, match=r"the checkpoint lacks 1 weights \(model\.layers\.1\.mlp\.up_proj"):
        load_model(model_spec(tmp_path))


def test_without_the_package_the_error_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setattr("betakd_ray.models.gguf.is_gguf_available", lambda: False)
    with pytest.raises(ModelError, match=r"pip install 'betakd_ray\[gguf\]'"):
        load_config(model_spec(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "/models/a.gguf", "../a.gguf", "s3://bucket/a.gguf", "~/a.gguf"])
def test_only_a_gguf_within_the_folder_can_be_named(name):
    with pytest.raises(ValidationError, match=r"not a \.gguf file inside path"):
        ModelSpec(path="org/model", gguf_file=name)


def test_a_path_that_is_a_gguf_is_told_where_it_belongs():
    with pytest.raises(ValidationError, match=r"path: /models and gguf_file: a\.gguf"):
        ModelSpec(path="/models/a.gguf")
    for field in ("language_model", "vision_tower"):
        parts = {"kind": "parts", "language_model": "org/words", "vision_tower": "org/tower", field: "/models/a.gguf"}
        with pytest.raises(ValidationError, match=rf"init\.parts\.{field}[^;]*the folder of a model is expected"):
            StudentSpec.model_validate({"init": parts})


def test_there_is_nothing_to_say_about_the_quantisation_of_a_gguf():
    with pytest.raises(ValidationError, match="the weights of a gguf_file are dequantised; leave it out"):
        TeacherSpec(path="org/model", gguf_file=NAME, options={"quantization_config": {"quant_method": "gguf"}})
