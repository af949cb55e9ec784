"""The first steps of `make smollm`, small: a tower from an ONNX graph, a student with fewer layers, captions."""

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Dinov2Config, Dinov2Model

from betakd_ray.models.vlm import language_model
from jobs.easy_vqa.data import captions
from jobs.easy_vqa.samples import easy_vqa_samples
from jobs.smollm.parts import dinov2_state, write_with_fewer_layers
from tests.tiny import save_tiny


def traced(state: dict[str, torch.Tensor]) -> onnx.GraphProto:
    """Return the graph of a Dinov2Model as tracing leaves it, with only the nodes of matrix products."""
    constants, nodes = {"decoder.final.bias": torch.zeros(3), "onnx::MatMul_99": torch.ones(3, 2)}, []
    nodes.append(helper.make_node("MatMul", ["x", "onnx::MatMul_99"], ["y"], name="/decoder/final/MatMul"))
    for name, tensor in state.items():
        if name == "embeddings.position_embeddings":
            constants |= {"onnx::Concat_1": tensor[:, :1], "onnx::Reshape_2": tensor[:, 1:]}
        elif name.endswith(".weight") and tensor.ndim == 2:
            module, operand = name.removesuffix(".weight"), f"onnx::MatMul_{len(nodes)}"
            path = "/backbone/" + module.replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            constants[operand] = tensor.T
            nodes.append(helper.make_node("MatMul", ["x", operand], ["y"], name=path))
        else:
            constants[f"backbone.{name}"] = tensor
    arrays = [numpy_helper.from_array(tensor.numpy().copy(), name) for name, tensor in constants.items()]
    return helper.make_graph(nodes, "traced", [], [], arrays)


def test_a_traced_tower_gives_back_its_weights(tmp_path):
    config = Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("embeddings.mask_token")
    found = dinov2_state(traced(state))
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("layers", "kept"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4])])
def test_a_student_with_fewer_layers_has_the_first_and_the_last(tmp_path, layers, kept):
    save_tiny(tmp_path / "whole", layers=5)
    write_with_fewer_layers(tmp_path / "whole", layers, tmp_path / "student")
    whole, student = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("whole", "student"))
    assert student.config.text_config.num_hidden_layers == layers
    for layer, number in zip(language_model(student).layers, kept, strict=True):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, language_model(whole).layers[number].state_dict()[name])
    for name, tensor in whole.state_dict().items():
        assert "layers" in name or torch.equal(student.state_dict()[name], tensor), name
    assert AutoProcessor.from_pretrained(tmp_path / "student").tokenizer.get_vocab()


def test_captions_say_what_the_questions_of_their_image_do():
    said = {sample["images"][0]: sample["conversations"][1]["value"] for sample in captions()}
    assert len(said) > 3000
    for sample in easy_vqa_samples("train"):
        if sample["type"] == "open" and (caption := said.get(sample["images"][0])):
            assert sample["conversations"][1]["value"] in caption.split()
