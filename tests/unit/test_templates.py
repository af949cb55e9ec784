"""A chat template is a program of the model's: what it may cost, and what becomes of one that fails."""

import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError

from betakd_ray.data import template_process
from betakd_ray.data.render import Renderer, Unrenderable
from betakd_ray.data.template_process import TemplateFailed, TemplateProcess, render_template
from betakd_ray.data.templates import EXCEEDED_IN_A_ROW
from betakd_ray.errors import SECRET_VARIABLES, ModelError, SpecError
from betakd_ray.spec import DataSpec
from tests.tiny import CHAT_TEMPLATE, raw_sample, tiny_processor, tiny_tokenizer

DAY = date(2024, 7, 26)
TURN = [{"role": "user", "content": "Hello"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(a=START) %}{% for _ in range(64) %}{% set n.a = GROWN %}{% endfor %}{{ n.a }}"


def spec(**options):
    return DataSpec.model_validate({"train": "/x.tar", **options})


def chat(template, make=tiny_tokenizer, **options):
    return Renderer(make(chat_template=template), spec(template="chat", **options))


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """Give templates a fifth of a second, in a process of this file's own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(template_process, "SECONDS", 0.2)
        template_process._process.cache_clear()
        yield
        template_process._process(os.getpid())._end()
        template_process._process.cache_clear()


# ---- what fails before a job starts ------------------------------------------------------------------------------

RAISING = {
    "a division by zero": ("{{ 1 // 0 }}", "raised ZeroDivisionError"),
    "a recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "raised RecursionError"),
    "parentheses in parentheses": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "raised RecursionError"),
    "bad syntax": ("{% for %}", "raised TemplateSyntaxError"),
    "an undefined field": ("{{ messages[0].tools.names }}", "raised UndefinedError"),
    "a wrong type": ("{{ messages + 1 }}", "raised TypeError"),
    "a way out of the sandbox": ("{{ ''.__class__.__mro__ }}", "raised SecurityError"),
    "a file": ("{% include '/etc/passwd' %}", "raised TypeError: no loader"),
    "half of a surrogate pair": ("{{ '\\ud800' }}" + CHAT_TEMPLATE, "wrote half of a surrogate pair at character 0"),
    "a refusal": ("{{ raise_exception('no \x1b[2J') }}", r"refuses the conversation: no  \[2J"),
    "no answer": ("{{ messages[0].content }}", "leaves out the answer"),
}
EXCEEDING = {
    "a product": ("{{ 'a' * 10**10 }}", "needs more than 512 MB of memory"),
    "a sum that doubles": (
        DOUBLED.replace("START", "'a'").replace("GROWN", "n.a + n.a"),
        "needs more than|took more than",
    ),
    "a text that doubles": (
        DOUBLED.replace("START", "'a'").replace("GROWN", "n.a ~ n.a"),
        "needs more than|took more than",
    ),
    "a padded text": ("{{ 'a'|center(10000000000) }}", "needs more than 512 MB"),
    "a format": ("{{ '%010000000000d' % 1 }}", "needs more than 512 MB"),
    "a power": ("{{ 7**(10**9) }}", "took more than 0.2 s of CPU time"),
    "a loop in a loop": (LOOP, "took more than 0.2 s of CPU time"),
    "a list of lists": (
        DOUBLED.replace("START", "[1]").replace("GROWN", "[n.a, n.a]"),
        "needs more than|took more than",
    ),
    "a long text": ("{{ 'ab' * 10**6 }}", r"wrote more than 1,\d+,\d+ characters"),
}


@pytest.mark.parametrize("case", RAISING | EXCEEDING)
def test_a_template_that_fails_is_the_model_s_fault_and_found_by_the_check(case):
    template, said = (RAISING | EXCEEDING)[case]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=rf"(?s)({said}).*human: 'What\?', gpt: 'A probe.'.*set data.template"):
        chat(template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("template", [LOOP, "{{ 1 // 0 }}", "{{ 'a' * 10**10 }}"])
def test_a_template_of_a_model_with_images_is_checked_alike(template):
    with pytest.raises(ModelError, match="chat template"):
        chat(template, tiny_processor)


def test_the_message_names_the_model():
    tokenizer = tiny_tokenizer(chat_template="{{ 1 // 0 }}")
    tokenizer.name_or_path = "org/model"
    with pytest.raises(ModelError, match="org/model: the chat template raised ZeroDivisionError"):
        Renderer(tokenizer, spec(template="chat"))


def test_a_template_that_refuses_the_system_prompt_is_found_by_the_check():
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    chat(refusing)
    with pytest.raises(ModelError, match=r"no system role.* with data\.system_prompt 'Be short.'"):
        chat(refusing, system_prompt="Be short.")


# ---- what fails for some samples ---------------------------------------------------------------------------------


def failing_on(word, fault):
    return f"{{% if messages[-1].content == '{word}' %}}{fault}{{% endif %}}" + CHAT_TEMPLATE


@pytest.mark.parametrize(("fault", "said"), [RAISING["a division by zero"], EXCEEDING["a product"], (LOOP, "0.2 s")])
def test_a_sample_on_which_a_template_fails_is_refused_alone_in_any_thread(fault, said):
    view = chat(failing_on("bad", fault))
    whole = view.render(raw_sample(0, "good", has_image=False)).input_ids.tolist()

    def bad_and_good():
        with pytest.raises(Unrenderable, match=f"the chat template .*{said}"):
            view.render(raw_sample(1, "bad", has_image=False))
        return view.render(raw_sample(2, "good", has_image=False)).input_ids.tolist()

    with ThreadPoolExecutor(2) as threads:
        assert [future.result() for future in [threads.submit(bad_and_good) for _ in range(2)]] == [whole] * 2


def test_a_template_that_exceeds_its_limits_again_and_again_ends_the_job():
    view = chat(failing_on("bad", EXCEEDING["a long text"][0]))
    bad, good = (raw_sample(0, word, has_image=False) for word in ("bad", "good"))

    def refused(times):
        for _ in range(times):
            with pytest.raises(Unrenderable, match="wrote more than"):
                view.render(bad)

    refused(EXCEEDED_IN_A_ROW - 1)
    view.render(good)  # which begins the row again
    refused(EXCEEDED_IN_A_ROW - 1)
    with pytest.raises(ModelError, match=f"wrote more than .* on {EXCEEDED_IN_A_ROW} conversations in a row"):
        view.render(bad)


def test_a_function_of_the_user_s_that_raises_refuses_the_sample(tmp_path, monkeypatch):
    code = "def own(turns, system, eos):\n    {'A probe.': 0, 'Text': 0}[turns[1]['value']]\n"
    (tmp_path / "own_templates.py").write_text(
        code + "    return [('Q', False), (turns[1]['value'] + eos, True)]\n" + code.replace("own", "text")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    view = Renderer(tiny_tokenizer(), spec(template="own_templates:own"))
    with pytest.raises(Unrenderable, match="own_templates:own raised KeyError: 'yes'"):
        view.render(raw_sample(0, "yes", has_image=False))
    with pytest.raises(SpecError, match="own_templates:text raises TypeError"):
        Renderer(tiny_tokenizer(), spec(template="own_templates:text"))


# ---- the same text at any time and in any process ----------------------------------------------------------------

UNREPEATABLE = {
    "a random choice": ("{{ ['a', 'b']|random }}", "the filter `random`"),
    "a random text": ("{{ lipsum(n=1) }}", "the function `lipsum`"),
    "a random text in a macro": ("{% macro f() %}{{ lipsum() }}{% endmacro %}{{ f() }}", "the function `lipsum`"),
    "the address of a function": ("{{ raise_exception }}", r"an object of Python, printed as `at 0x\w+`"),
    "the address of a generator": (
        "{{ messages|map(attribute='role') }}",
        r"an object of Python, printed as `at 0x\w+`",
    ),
}
LLAMA = (
    "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y %H:%M') %}{%- endif %}"
    "{{ 'Today Date: ' + day + '\n' }}"
) + CHAT_TEMPLATE  # fmt: skip


@pytest.mark.parametrize("case", UNREPEATABLE)
def test_a_template_whose_text_differs_each_time_is_refused_by_the_check(case):
    template, said = UNREPEATABLE[case]
    with pytest.raises(ModelError, match=rf"the chat template uses {said}, which gives another text each time"):
        chat(template + CHAT_TEMPLATE)


def test_an_address_in_the_data_is_text_as_any_other():
    turns = [{"role": "user", "content": "What is <object at 0x7f00>?"}]
    assert render_template("{{ messages[0].content }}", turns, {}, DAY, generation=False) == turns[0]["content"]


def test_the_date_of_a_template_is_the_spec_s_on_every_day(monkeypatch):
    sample = raw_sample(0, "This.", has_image=False)

    def seen(**options):
        view = chat(LLAMA, **options)
        return view.tokenizer.decode(view.render(sample).input_ids), view.fingerprint

    before = seen()
    assert "Today Date: 26 Jul 2024 00:00" in before[0]
    template_process._process(os.getpid())._end()
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")  # where the day begins first
    assert seen() == before
    other = seen(template_date="2026-01-02")
    assert "Today Date: 02 Jan 2026 00:00" in other[0]
    assert other[1] != before[1]


def test_a_date_that_only_some_samples_show_is_in_the_fingerprint_and_one_that_none_shows_is_not():
    rare = "{% if messages|length > 3 %}{{ strftime_now('%Y') }}{% endif %}" + CHAT_TEMPLATE
    days = ("2024-07-26", "2026-01-02")
    assert len({chat(rare, template_date=day).fingerprint for day in days}) == 2
    assert len({chat(CHAT_TEMPLATE, template_date=day).fingerprint for day in days}) == 1


def test_a_date_without_a_chat_template_is_an_error():
    with pytest.raises(ValueError, match="template_date: is used only with `template: chat`, but template is plain"):
        spec(template="plain", template_date="2026-01-02")


def test_a_function_of_the_user_s_that_returns_another_text_each_time_is_refused(tmp_path, monkeypatch):
    code = "import itertools\nCALLS = itertools.count()\ndef own(turns, system, eos):\n"
    code += "    return [(f'{next(CALLS)} Q', False), (turns[1]['value'] + eos, True)]\n"
    (tmp_path / "counting_templates.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SpecError, match=r"returns .*'0 Q'.* and then .*'1 Q'.*must always return the same"):
        Renderer(tiny_tokenizer(), spec(template="counting_templates:own"))


# ---- the process -------------------------------------------------------------------------------------------------

FEATURES = (
    "{{ bos_token }}{%- for m in messages -%}{% if loop.last %}{% generation %}{{ m | tojson }}{% endgeneration %}"
    "{% break %}{% endif %}{{ m.content.split('l')[-1] | trim }}{% endfor %}{% set n = namespace(x=1) %}\n  {{ n.x }}\n"
)


@pytest.mark.parametrize("template", [FEATURES, CHAT_TEMPLATE])
@pytest.mark.parametrize("generation", [True, False])
def test_a_text_is_what_transformers_renders(template, generation):
    tokenizer = tiny_tokenizer()
    messages = [*TURN, {"role": "assistant", "content": "ünïcode ✓\n\u2028\U0001f600"}]
    text = render_template(template, messages, tokenizer.special_tokens_map, DAY, generation=generation)
    assert text == tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generation
    )


def test_transformers_own_refusals_have_the_class_that_the_program_looks_for():
    with pytest.raises(TemplateError) as refused:
        tiny_tokenizer().apply_chat_template(TURN, chat_template="{{ raise_exception('no') }}", tokenize=False)
    assert type(refused.value).__name__ == "TemplateError"


def started() -> TemplateProcess:
    assert render_template("{{ messages[0].content }}", TURN, {}, DAY, generation=False) == "Hello"
    return template_process._process(os.getpid())


def test_a_process_that_the_system_ends_is_replaced():
    process = started()
    assert process._child is not None
    os.kill(process._child.pid, signal.SIGKILL)
    process._child.wait()
    started()


def test_an_interrupted_question_leaves_no_answer_for_the_next(monkeypatch):
    started()
    ask = template_process._exchanged

    def interrupted(child, request):
        ask(child, request)
        raise KeyboardInterrupt

    monkeypatch.setattr(template_process, "_exchanged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_template("another", TURN, {}, DAY, generation=False)
    monkeypatch.undo()
    started()


def test_a_process_that_does_not_start_is_no_fault_of_a_template(monkeypatch):
    template_process._process(os.getpid())._end()
    monkeypatch.setattr(template_process.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        render_template("x", TURN, {}, DAY, generation=False)


def test_a_process_of_templates_has_no_credentials_and_ends_with_its_pipe(monkeypatch):
    template_process._process(os.getpid())._end()
    monkeypatch.setenv(SECRET_VARIABLES[0], "canary")
    child = started()._child
    assert child is not None
    assert b"canary" not in Path(f"/proc/{child.pid}/environ").read_bytes()
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(60) == 0
    template_process._process(os.getpid())._end()


def test_a_message_of_a_template_is_short():
    with pytest.raises(TemplateFailed) as failed:
        render_template("{{ raise_exception('a' * 10**6) }}", TURN, {}, DAY, generation=False)
    assert len(str(failed.value)) < 300
