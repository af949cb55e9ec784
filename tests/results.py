"""Results of training without the training: a model's folder as a job writes it, and what plain transformers says."""

import io
import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import transformers
from PIL import Image
from transformers import PreTrainedModel
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from betakd_ray.data.render import Renderer
from betakd_ray.data.samples import RawSample
from betakd_ray.evaluation.generate import answers
from betakd_ray.models.load import load_model
from betakd_ray.models.vlm import freeze
from betakd_ray.run.folder import MODEL
from betakd_ray.run.lease import Permit
from betakd_ray.spec import JobSpec, ModelSpec, StorageSpec, parse_spec
from betakd_ray.train import export
from tests.tiny import IMAGE

QUESTIONS = ("What is it?", "Which colour is it, ünïcode?", "Is it red?\nSay yes or no.", "  How many?  ", "Why not")
ANSWERS = ("A red circle.", "Blue", "yes", "not the same")
NEW_TOKENS = 8
PLAIN = """
import inspect, io, json, sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.modules["betakd_ray"] = None  # as where it is not installed
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers import AutoTokenizer, processing_utils
from transformers.utils import is_torchvision_available


def processor_of(folder):
    try:
        return AutoProcessor.from_pretrained(folder, backend=sys.argv[1])
    except (ImportError, ValueError, OSError):
        if is_torchvision_available():
            raise
        # transformers loads processors that also take videos only with torchvision. Without it: the same, by hand.
        import transformers
        from transformers.models.smolvlm import processing_smolvlm

        saved = json.loads((folder / "processor_config.json").read_text())
        kind = getattr(transformers, saved.pop("processor_class"))
        options = {name: value for name, value in saved.items() if not isinstance(value, dict)}
        if "video_processor" in inspect.signature(kind).parameters:  # SmolVLM's asks it for two numbers
            options["video_processor"] = SimpleNamespace(num_frames=1, fps=1)
        parts = AutoImageProcessor.from_pretrained(folder, backend=sys.argv[1]), AutoTokenizer.from_pretrained(folder)
        with (
            mock.patch.object(processing_utils.ProcessorMixin, "check_argument_for_proper_class"),
            mock.patch.object(processing_smolvlm, "num2words", str),
        ):
            return kind(*parts, chat_template=(folder / "chat_template.jinja").read_text(), **options)


def said(folder, conversations):
    torch.manual_seed(0)
    processor = processor_of(folder)
    sees = hasattr(processor, "image_processor")
    model = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(folder)
    found = []
    for messages in conversations:
        for message in messages:
            for part in message["content"] if sees else ():
                if "image" in part:
                    part["image"] = Image.open(io.BytesIO(bytes.fromhex(part["image"])))
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
        inputs = inputs.to(model.device, model.dtype) if sees else inputs.to(model.device)
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=int(sys.argv[2]))[0, length:]
        found.append([processor.decode(tokens, skip_special_tokens=True).strip(), inputs["input_ids"][0].tolist()])
    return found


asked = json.load(sys.stdin)
print(json.dumps({folder: said(Path(folder), each) for folder, each in asked.items()}))
"""
"""Program that asks models with transformers alone: {folder: conversations} to {folder: [[answer, prompt], …]}."""


def spec_of(folder: Path, data: dict[str, Any], **sections: Any) -> JobSpec:
    """Return the spec of a job that would have made the result in `folder`."""
    tree = {
        "name": folder.name,
        "data": {"train": str(folder / "shards/*.tar"), **data},
        "student": {"init": {"kind": "checkpoint", "path": str(folder / "student")}},
        "training": {"precision": "fp32", "zero_stage": 0},
        "objective": {"energies": [], "weighting": "equal"},
        "output": str(folder.parent),
        **sections,
    }
    return parse_spec(tree)


def write_result(folder: Path, model: PreTrainedModel, processor: Any, data: dict[str, Any], **sections: Any) -> Path:
    """Export a model as the end of a job does, into the run's folder; return the model's folder."""
    spec = spec_of(folder, data, **sections)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(spec.model_dump_json())
    state = {f"student.{name}": each for name, each in model.state_dict().items()}
    engine = SimpleNamespace(module=SimpleNamespace(student=model, state_dict=lambda: state))
    alone = SimpleNamespace(get_rank=lambda: 0, barrier=lambda group: None)
    with (
        mock.patch.object(export, "dist", alone),
        mock.patch.object(export, "student_processor", return_value=processor),
        _complete(processor, model.config.model_type),
    ):
        export.export_student(engine, spec, Permit(str(folder), StorageSpec()), {"loss": 0.5, "step": 7}, step=7)
    return folder / MODEL


def _complete(processor: Any, family: str) -> AbstractContextManager[Any]:
    """Give a processor of tests.families what transformers needs in order to save it and to load it again."""
    if getattr(processor, "video_processor", 0) is not None:
        return nullcontext()
    # The tokens that tests.families sets as attributes: a published tokenizer has them in its files.
    own = vars(processor.tokenizer).items()
    named = {name: value for name, value in own if name.endswith("_token") and isinstance(value, str)}
    processor.tokenizer._set_model_specific_special_tokens(special_tokens=named)
    if is_torchvision_available():
        processor.video_processor = getattr(transformers, VIDEO_PROCESSOR_MAPPING_NAMES[family]["torchvision"])()
        return nullcontext()
    return mock.patch.object(type(processor), "get_attributes", return_value=["image_processor", "tokenizer"])


def samples(count: int, *, images: bool = True, turns: bool = True) -> list[RawSample]:
    """Return different questions, with up to two images and two turns, and images of different shapes."""
    made = []
    for number in range(count):
        generator = np.random.default_rng(number)
        pictures, conversation = [], []
        for turn in range(1 + (number % 3 == 2 and turns)):
            shown = int(generator.integers(0, 3)) if images and turn == 0 else 0
            for _ in range(shown):
                width, height = generator.integers(8, 70, 2)
                pixels = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG")
                pictures.append(buffer.getvalue())
            question = f"{QUESTIONS[number % len(QUESTIONS)]} {number // len(QUESTIONS) or ''}"
            conversation.append({"from": "human", "value": f"{IMAGE}\n" * shown + question})
            conversation.append({"from": "gpt", "value": ANSWERS[number % len(ANSWERS)]})
        made.append(RawSample(str(number), number, str(number), conversation, pictures))
    return made


def evaluated(result: Path, renderer: Renderer, asked: list[RawSample]) -> list[str | None]:
    """Return what our evaluation gets from a result."""
    model = freeze(load_model(ModelSpec(path=str(result))))
    return list(answers(model, renderer, asked, batch_size=4, max_new_tokens=NEW_TOKENS))


def plain_answers(
    asked: dict[Path, tuple[bool, list[RawSample]]], backend: str = "pil"
) -> dict[Path, list[tuple[str, list[int]]]]:
    """Return what a fresh process with transformers alone says, and the tokens of its prompts.

    `asked` has for each result whether it takes images, and the samples.
    """
    conversations = {
        str(folder): [_messages(sample, in_parts=sees) for sample in each] for folder, (sees, each) in asked.items()
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", PLAIN, backend, str(NEW_TOKENS)]
    done = subprocess.run(
        command, input=json.dumps(conversations), cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {Path(folder): [(text, tokens) for text, tokens in each] for folder, each in found.items()}


def _messages(sample: RawSample, *, in_parts: bool) -> list[dict[str, Any]]:
    """Return the question of a sample as a user of transformers would write it."""
    images = iter(sample.images)
    messages = []
    for turn in sample.conversation[:-1]:
        text = turn["value"].replace(IMAGE, "")
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        text = text.strip() if role == "user" else text
        shown = [{"type": "image", "image": next(images).hex()} for _ in range(turn["value"].count(IMAGE))]
        messages.append({"role": role, "content": [*shown, {"type": "text", "text": text}] if in_parts else text})
    return messages
