"""The teacher's answer to a micro-batch, against the model's own full forward."""

import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from betakd_ray.batch.inputs import ModelInputs
from betakd_ray.batch.normalization import Normalization
from betakd_ray.batch.packing import stack
from betakd_ray.data.render import Renderer
from betakd_ray.errors import ModelError, TeacherError
from betakd_ray.models.load import load_model, load_processor
from betakd_ray.models.vlm import lm_head
from betakd_ray.spec import DataSpec, ModelSpec, TeacherSpec
from betakd_ray.teacher.answers import Answer, empty_signal, join_signals, places, to_tensor, to_wire
from betakd_ray.teacher.parts import Needs, Signal, value_bytes
from betakd_ray.teacher.scorer import TeacherScorer
from tests.tiny import VOCAB, raw_sample, save_tiny

CPU = torch.device("cpu")
EVERYTHING = Needs(frozenset({"hidden", "visual", "teacher_vision", "teacher_answer", "teacher_entropy"}))
IMAGES = [True, False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("teacher"), seed=4)


@pytest.fixture(scope="module")
def renderings(folder):
    renderer = Renderer(load_processor(ModelSpec(path=folder)), DataSpec(train=("unused",)))
    answers = ["It is " + "so " * 3 * number + "." for number in range(len(IMAGES))]
    samples = (
        raw_sample(number, answer, has_image=has_image)
        for number, (answer, has_image) in enumerate(zip(answers, IMAGES, strict=True))
    )
    return renderer, [renderer.render(sample) for sample in samples]


@pytest.fixture(scope="module")
def inputs(renderings) -> ModelInputs:
    renderer, found = renderings
    return stack(found, renderer.pad_token_id, renderer.image_token_id)


@pytest.fixture(scope="module")
def logits(folder, renderings):
    """Return the logits [answer rows, V] of each sample run alone through the whole model, without padding."""
    renderer, found = renderings
    model = load_model(ModelSpec(path=folder), torch.float32)
    rows = []
    for one in found:
        pixels = None
        if one.pixels is not None:
            mean, std = (
                torch.tensor(values)[:, None, None]
                for values in (renderer.image_processor.image_mean, renderer.image_processor.image_std)
            )
            pixels = (torch.from_numpy(one.pixels) / 255 - mean) / std
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            whole = model(input_ids=ids, pixel_values=pixels).logits[0]
        rows += [whole[n - 1] for n in np.flatnonzero(one.answer_mask)]
    return torch.stack(rows)


def teacher_of(folder, needs: Needs, **fields) -> TeacherScorer:
    return TeacherScorer(TeacherSpec(path=folder, **fields), needs)


def parts_of(teacher: TeacherScorer, inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """Return the parts that a student reads from an answer in which every sample is valid."""
    signals = Answer.of(teacher.score(inputs)).signals
    assert None not in signals
    joined = join_signals([signal for signal in signals if signal is not None], inputs, teacher.needs)
    return {name: to_tensor(array, CPU) for name, array in joined.items()}


def test_hidden_rows_and_head_give_the_model_s_own_logits(folder, inputs, logits):
    teacher = teacher_of(folder, EVERYTHING)
    facts, head = teacher.facts(), teacher.head()
    assert head is not None
    found = parts_of(teacher, inputs)["hidden"] @ to_tensor(head, CPU).t()
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
    assert (facts.fingerprint, facts.dtype, facts.width) == ("", "float32", head.shape[1])
    assert facts.feature_sizes == {"teacher_vision": facts.width, "teacher_answer": facts.width, "teacher_entropy": 2}


def test_attention_is_the_first_layer_s_from_each_answer_row_to_each_image_token(folder, renderings, inputs):
    renderer, found = renderings
    parts = parts_of(teacher_of(folder, Needs(frozenset({"attention", "salience"}))), inputs)
    model = load_model(ModelSpec(path=folder, attn_implementation="eager"), torch.float32)
    expected, salience = [], []
    for one in found:
        if one.pixels is None:
            continue
        pixels = Normalization.of(renderer.image_processor)(torch.from_numpy(one.pixels), torch.float32)
        ids = torch.from_numpy(one.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            weights = model(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions[0][0]
        rows = np.flatnonzero(one.answer_mask) - 1
        tokens = np.flatnonzero(one.input_ids == renderer.image_token_id)
        expected += [weights[:, n, m] for n in rows for m in tokens]
        salience += [weights[:, rows, m].mean() for m in tokens]
    torch.testing.assert_close(parts["attention"], torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["salience"], torch.stack(salience), rtol=1e-4, atol=1e-6)


def test_a_layer_s_output_is_that_of_the_image_tokens(folder, renderings, inputs):
    renderer, found = renderings
    parts = parts_of(teacher_of(folder, Needs(frozenset({"visual_layer"}), layer=1)), inputs)
    assert list(parts) == ["visual_layer"]
    model = load_model(ModelSpec(path=folder), torch.float32)
    expected = []
    for one in found:
        if one.pixels is None:
            continue
        pixels = Normalization.of(renderer.image_processor)(torch.from_numpy(one.pixels), torch.float32)
        ids = torch.from_numpy(one.input_ids.astype(np.int64))
        with torch.no_grad():
            states = model(input_ids=ids[None], pixel_values=pixels, output_hidden_states=True).hidden_states
        expected.append(states[1][0][ids == renderer.image_token_id])
    torch.testing.assert_close(parts["visual_layer"], torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_features_are_the_plain_loops(folder, inputs, logits):
    parts = parts_of(teacher_of(folder, EVERYTHING), inputs)
    hidden, visual = parts["hidden"], parts["visual"]
    for sample in range(len(IMAGES)):
        rows = [n for n, owner in enumerate(inputs.row_sample) if owner == sample]
        tokens = [n for n, owner in enumerate(inputs.visual_sample) if owner == sample]
        vision = visual[tokens].mean(0) if tokens else torch.zeros(visual.shape[1])
        torch.testing.assert_close(parts["teacher_vision"][sample], vision)
        torch.testing.assert_close(parts["teacher_answer"][sample], hidden[rows].mean(0))
        entropies = [-math.fsum(p * math.log(p) for p in logits[n].double().softmax(0).tolist()) for n in rows]
        expected = [math.fsum(entropies) / len(rows), max(entropies)]
        assert parts["teacher_entropy"][sample].tolist() == pytest.approx(expected, rel=1e-4)


def test_top_k_are_the_largest_and_the_rest_of_the_common_ids(folder, inputs, logits):
    common = VOCAB - 3
    needs = Needs(frozenset({"top_ids", "top_log_probs"}), top_k=5, vocab=common)
    teacher = teacher_of(folder, needs, signal="top_k")
    parts = parts_of(teacher, inputs)
    assert teacher.head() is None
    assert set(parts) == needs.parts
    probs = logits[:, :common].double().softmax(1)
    sent = parts["top_log_probs"].double().exp()
    torch.testing.assert_close(sent.sum(1), torch.ones(len(logits), dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(sent[:, :-1], probs.sort(1, descending=True).values[:, :5], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(probs.gather(1, parts["top_ids"].long()), sent[:, :-1], rtol=1e-4, atol=1e-7)


def assert_only_is_refused(answer: Answer, refused: int, expected: Answer) -> None:
    """Check that only this sample is refused and that the signals of the others are unchanged."""
    assert answer.reasons == {refused: "the teacher's output is not finite"}
    for at, (signal, whole) in enumerate(zip(answer.signals, expected.signals, strict=True)):
        if at == refused:
            assert signal is None
            continue
        assert signal is not None
        assert whole is not None
        assert signal.keys() == whole.keys()
        for name, array in signal.items():
            np.testing.assert_array_equal(array, whole[name])


def test_a_sample_whose_layer_is_not_finite_has_no_signal_either(folder, inputs):
    teacher = teacher_of(folder, Needs(frozenset({"hidden", "visual_layer"}), layer=1))
    expected = Answer.of(teacher.score(inputs))
    at = (int(inputs.visual_sample[-1]), int(inputs.visual_position[-1]))

    def poison(_module, _arguments, output):
        output[at] = math.inf
        return output

    teacher.model.model.language_model.layers[0].register_forward_hook(poison)
    assert_only_is_refused(Answer.of(teacher.score(inputs)), 2, expected)


def test_a_sample_whose_answer_is_not_finite_has_no_signal_and_the_others_have_theirs(folder, inputs):
    teacher = teacher_of(folder, EVERYTHING)
    expected = Answer.of(teacher.score(inputs))
    first_row = int(inputs.answer_rows[0])

    def poison(_module, _arguments, output):
        output.last_hidden_state.flatten(0, 1)[first_row] = math.nan
        return output

    teacher.model.model.language_model.register_forward_hook(poison)
    assert_only_is_refused(Answer.of(teacher.score(inputs)), 0, expected)


def test_a_sample_says_the_same_alone_as_in_a_group_and_has_no_part_on_image_tokens_it_lacks(
    folder, renderings, inputs
):
    renderer, found = renderings
    teacher = teacher_of(folder, EVERYTHING)
    together = Answer.of(teacher.score(inputs)).signals
    for one, expected in zip(found, together, strict=True):
        alone = stack([one], renderer.pad_token_id, renderer.image_token_id)
        (signal,) = Answer.of(teacher.score(alone)).signals
        assert signal is not None
        assert expected is not None
        assert set(signal) == set(expected) == EVERYTHING.parts - ({"visual"} if one.pixels is None else set())
        for name, array in signal.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)


def test_groups_that_are_scored_at_once_get_their_own_answers(folder, renderings):
    """Attention is caught by a hook, of which several threads then have one each."""
    renderer, found = renderings
    teacher = teacher_of(folder, Needs(frozenset({"hidden", "attention"})))
    teacher._permits = threading.Semaphore(3)  # as a teacher over three GPUs
    groups = [stack([found[0]] * count, renderer.pad_token_id, renderer.image_token_id) for count in (1, 2, 3)]
    expected = [teacher.score(group) for group in groups]
    with ThreadPoolExecutor(3) as executor:
        for _ in range(5):
            for one, other in zip(executor.map(teacher.score, groups), expected, strict=True):
                for name, array in other.arrays.items():
                    np.testing.assert_allclose(one.arrays[name], array, rtol=1e-5, atol=1e-6)


def test_only_what_is_computed_counts_as_work(folder, inputs):
    teacher = teacher_of(folder, EVERYTHING)
    assert teacher.health() == 0.0
    begun, may_end = threading.Event(), threading.Event()

    def hold(*_):
        begun.set()
        may_end.wait(30)

    handle = teacher.model.register_forward_pre_hook(hold)
    hook = teacher.model.model.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(2) as executor:
        first = executor.submit(teacher.score, inputs)
        assert begun.wait(30)
        second = executor.submit(teacher.score, inputs)  # waits for its turn
        time.sleep(0.2)
        assert 0.2 <= teacher.health() < 5
        may_end.set()
        # The second's time began when the first was done.
        assert first.result().busy_s >= 0.2
        assert second.result().busy_s < 0.2 + first.result().busy_s
    handle.remove()
    hook.remove()
    assert teacher.health() == 0.0
    teacher.drain(0.05)  # nothing is in hand, so it returns


def test_the_parts_of_an_answer_fit_the_table(folder, inputs):
    """What is said of sizes beforehand is what comes: memory and forecast read it."""
    needs = Needs(EVERYTHING.parts | {"attention", "salience", "visual_layer"}, layer=2)
    teacher = teacher_of(folder, needs)
    facts = teacher.facts()
    for at, signal in enumerate(Answer.of(teacher.score(inputs)).signals):
        assert signal is not None
        rows, tokens = int(inputs.rows_per_sample[at]), int(inputs.visual_per_sample[at])
        empty = empty_signal(needs, facts, rows, tokens)
        assert {name: (array.shape, array.dtype) for name, array in signal.items()} == {
            name: (array.shape, array.dtype) for name, array in empty.items()
        }
        assert all(
            array.nbytes == value_bytes(name, needs, facts) * places(name, inputs)[at] for name, array in signal.items()
        )


def test_signals_that_do_not_fit_their_samples_are_refused_by_the_part_s_name(folder, inputs):
    needs = Needs(frozenset({"hidden", "visual"}))
    signals: list[Signal] = [
        dict(signal) for signal in Answer.of(teacher_of(folder, needs).score(inputs)).signals if signal
    ]
    short = [*signals[:2], signals[2] | {"hidden": signals[2]["hidden"][1:]}]
    with pytest.raises(TeacherError, match="values of 'hidden', but the sample has"):
        join_signals(short, inputs, needs)
    del signals[0]["visual"]
    with pytest.raises(TeacherError, match="0 values of 'visual', but the sample has 4"):
        join_signals(signals, inputs, needs)


def test_bfloat16_travels_as_it_is():
    tensor = torch.randn(3, 5).bfloat16()
    array = to_wire(tensor)
    assert array.dtype == np.uint16
    assert torch.equal(to_tensor(array, CPU), tensor)


def test_the_fingerprint_is_of_the_weights_and_made_only_for_a_cache(folder, tmp_path):
    def fingerprint(path):
        return TeacherScorer(TeacherSpec(path=str(path), cache=str(tmp_path)), EVERYTHING).facts().fingerprint  # type: ignore[arg-type]

    other = save_tiny(tmp_path / "other", seed=5)
    same = save_tiny(tmp_path / "same", seed=4)
    assert fingerprint(folder) == fingerprint(same) != fingerprint(other)


def test_code_that_came_with_a_checkpoint_is_in_the_fingerprint(tmp_path, monkeypatch):
    path = save_tiny(tmp_path / "model", seed=4)
    code = {}
    monkeypatch.setattr("betakd_ray.teacher.scorer.inspect.getsource", lambda module: code[module.__name__])

    def fingerprint(projector):
        code.update({module: "" for module in sys.modules})
        code["transformers.models.llava.modeling_llava"] = projector
        return TeacherScorer(TeacherSpec(path=path, cache=str(tmp_path)), EVERYTHING).facts().fingerprint  # type: ignore[arg-type]

    assert fingerprint("gelu") == fingerprint("gelu") != fingerprint("relu")


def test_what_else_transformers_asks_for_is_said_in_options(folder):
    spec = TeacherSpec(path=folder, options={"vision_feature_layer": -1})
    assert TeacherScorer(spec, EVERYTHING).model.config.vision_feature_layer == -1
    with pytest.raises(ModelError, match=r"cannot load it.*no_such_option"):
        TeacherScorer(TeacherSpec(path=folder, options={"no_such_option": 1}), EVERYTHING)
    for name, said in (("dtype", r"is set by teacher\.dtype"), ("use_safetensors", "a pickle"), ("token", "HF_TOKEN")):
        with pytest.raises(ValidationError, match=rf"options\.{name}: .*{said}"):
            TeacherSpec(path=folder, options={name: "x"})


def test_a_head_in_whole_numbers_is_refused(folder):
    model = load_model(ModelSpec(path=folder))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"lm_head in torch\.int8.*leaves the head as it is"):
        lm_head(model)
