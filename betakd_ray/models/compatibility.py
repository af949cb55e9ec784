"""Checks that a teacher fits a student, from tokenizers and configurations, before any weights are loaded."""

from typing import Any

from betakd_ray.errors import ModelError, VocabularyMismatch
from betakd_ray.spec import VISUAL_ENERGIES, ObjectiveSpec

PROBE = "Is the 2nd shape (on the left) a blue triangle?\n\tÉtait-ce — 它是 🟦 0x1F\\n?"


def check_vocabularies(teacher_processor: Any, student_processor: Any) -> None:
    """Raise VocabularyMismatch unless the tokenizers agree wherever both define a token.

    The check compares contents, not sizes: one family pads its vocabulary to several sizes, and two families may have
    vocabularies of the same size.
    """
    teacher, student = (
        getattr(processor, "tokenizer", processor) for processor in (teacher_processor, student_processor)
    )
    teacher_vocab, student_vocab = teacher.get_vocab(), student.get_vocab()
    for token in teacher_vocab.keys() & student_vocab.keys():
        if teacher_vocab[token] != student_vocab[token]:
            raise VocabularyMismatch(_explain(token, teacher_vocab[token], student_vocab[token]))
    # The loop above compares tokens that both sides have. Two different tokens may still have the same id.
    teacher_tokens = {index: token for token, index in teacher_vocab.items()}
    student_tokens = {index: token for token, index in student_vocab.items()}
    for index in teacher_tokens.keys() & student_tokens.keys():
        if teacher_tokens[index] != student_tokens[index]:
            raise VocabularyMismatch(_explain(student_tokens[index], None, index))
    if teacher.encode(PROBE) != student.encode(PROBE):
        raise VocabularyMismatch(
            "teacher's and student's tokenizers have the same tokens but split text differently (merges or normalizer "
            "differ). Choose a teacher of the student's family."
        )


def check_processor(path: str, config: Any, processor: Any) -> None:
    """Raise ModelError for ids of the tokenizer without a row of the embedding, or for image settings that are missing.

    Both would end in an error of a CUDA kernel or of the first forward pass, after GPUs are taken.
    """
    tokenizer, rows = getattr(processor, "tokenizer", processor), config.get_text_config().vocab_size
    token, last = max(_used(processor).items(), key=lambda pair: pair[1])
    if last >= rows:
        raise ModelError(
            f"{path}: the tokenizer has ids up to {last} ({token!r}), but the model's embedding has {rows} rows. Load "
            "the model, call resize_token_embeddings(len(tokenizer)), and save it again; or use its own tokenizer."
        )
    for name in ("patch_size", "vision_feature_select_strategy"):
        if processor is not tokenizer and getattr(processor, name, "") is None:
            vision = getattr(config, "vision_config", None)
            known = getattr(config, name, None) or getattr(vision, name, None)
            raise ModelError(
                f"{path}: its processor has no {name}, so the number of an image's tokens is not known. Add "
                f'"{name}": {known!r} to processor_config.json, as the model\'s config.json has it.'
            )


def _used(processor: Any) -> dict[str, int]:
    """Return token → id, without control tokens that nobody writes: no role, not in a chat template.

    transformers adds such a token to each tokenizer that it makes from a GGUF. In the text of data it is refused.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    roles = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, getattr(processor, "image_token", None)}
    written = f"{processor.chat_template} {tokenizer.chat_template}"
    control = {each.content for each in tokenizer.added_tokens_decoder.values() if each.special}
    unused = {token for token in control - roles if token not in written}
    return {token: index for token, index in tokenizer.get_vocab().items() if token not in unused}


def check_features(objective: ObjectiveSpec, teacher_tokens: tuple[int, ...], student_tokens: tuple[int, ...]) -> None:
    """Raise ModelError if an energy compares image tokens and the two models make different numbers of them.

    `teacher_tokens` and `student_tokens` are the numbers of image tokens, for images of the same few sizes.
    """
    visual = [name for name in objective.channels if name in VISUAL_ENERGIES]
    if visual and not (any(teacher_tokens) and any(student_tokens)):
        raise ModelError(f"objective.energies: {', '.join(visual)} compare image tokens, but a language model has none")
    if visual and teacher_tokens != student_tokens:
        raise ModelError(
            f"objective.energies: {', '.join(visual)} compare image tokens one by one. For test images of some "
            f"sizes, the teacher makes {teacher_tokens} tokens and the student {student_tokens}. Remove these "
            "energies, or choose models with the same image size and patches."
        )


def check_feature_layer(objective: ObjectiveSpec, teacher: Any, student: Any) -> None:
    """Raise ModelError if `fd.layer` names a layer that the teacher or the student does not have.

    `teacher` and `student` are the configurations of the models.
    """
    if objective.feature_layer is None:
        return
    for name, config in (("teacher", teacher), ("student", student)):
        layer, layers = getattr(objective.feature_layer, name), config.get_text_config().num_hidden_layers
        if layer > layers:
            raise ModelError(
                f"objective.energies: fd.layer.{name} is {layer}, but the {name}'s language model has {layers} layers: "
                f"give a number from 1 to {layers}"
            )


def _explain(token: str, teacher_id: int | None, student_id: int) -> str:
    seen = "gives this id to another token" if teacher_id is None else f"maps it to id {teacher_id}"
    return (
        f"the student's tokenizer maps {token!r} to id {student_id}, but the teacher's {seen}. Energies on logits need "
        "the same vocabulary. Choose a teacher of the student's family."
    )
