"""What a job opens runs nothing, and what it says and writes holds no credential (docs/security.md)."""

import json
import logging
import os
import pickle
import threading
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from betakd_ray.data.pack import pack
from betakd_ray.engine.checkpoint import make_universal
from betakd_ray.engine.unpickling import FORCE, tensors_only
from betakd_ray.errors import SECRET_VARIABLES, BetaKDError, DataError, ModelError, OutputError, SpecError
from betakd_ray.job import BetaKDJob
from betakd_ray.models.load import load_config, load_model, load_processor, model_skeleton
from betakd_ray.models.student import build_student
from betakd_ray.run.lease import Permit
from betakd_ray.spec import EvaluationSpec, JobSpec, ModelSpec, OutputSpec, PackSpec, StorageSpec, load_spec, parse_spec
from betakd_ray.tracking import MetricsWriter
from betakd_ray.train.distiller import Distiller
from betakd_ray.train.export import export_student
from betakd_ray.train.learner import Learner
from tests.tiny import numbered_samples, save_tiny, tiny_model

CANARIES = {name: f"canary-of-{name.lower()}" for name in SECRET_VARIABLES}


class Trap:
    """Object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """Return the path of the file that exists only after a trap was run."""
    return tmp_path / "sprung"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and a shard."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny(folder / "model")
    pack(numbered_samples(8), str(folder / "shards"))
    return folder


def tree(home: Path, out: str, **changes: Any) -> dict[str, Any]:
    """Return the tree of a plain fine-tuning job, unless a change adds a teacher."""
    job: dict[str, Any] = {
        "name": "job",
        "data": {"train": str(home / "shards" / "train-*.tar")},
        "student": {"init": {"kind": "checkpoint", "path": str(home / "model")}},
        "training": {"global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
        "output": out,
    }
    return {**job, **changes}


def by_teacher(path: str) -> dict[str, Any]:
    return {"teacher": {"path": path}, "objective": {"energies": "fkl"}}


# ---- models ------------------------------------------------------------------------------------------------------


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def whole(folder: Path, state: Any) -> str:
    torch.save(state, folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def sharded(folder: Path, state: Any) -> str:
    torch.save(state, folder / "pytorch_model-1.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "pytorch_model-1.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return "pytorch_model-1.bin"


def indexed_as_safe(folder: Path, state: Any) -> str:
    sharded(folder, state)
    (folder / "pytorch_model.bin.index.json").rename(folder / "model.safetensors.index.json")
    return "pytorch_model-1.bin"


def named_in_config(folder: Path, state: Any) -> str:
    torch.save(state, folder / "adapter_model.bin")
    rewrite(folder / "config.json", transformers_weights="adapter_model.bin")
    return "adapter_model.bin"


@pytest.mark.parametrize("layout", [whole, sharded, indexed_as_safe, named_in_config])
def test_weights_in_a_pickle_are_refused_unopened_and_before_a_cluster_is_asked(home, tmp_path, sprung, layout):
    folder = tmp_path / "pickled"
    save_tiny(folder)
    (folder / "model.safetensors").unlink()
    file = layout(folder, {**tiny_model().state_dict(), "trap": Trap(sprung)})
    init = {"kind": "checkpoint", "path": str(folder)}
    for change in (by_teacher(str(folder)), {"student": {"init": init}}):
        with pytest.raises(ModelError, match=rf"pickled: its weights are in {file}, a pickle.*save_pretrained"):
            BetaKDJob(parse_spec(tree(home, str(tmp_path / "out"), **change))).check()
    with pytest.raises(ModelError, match=file):
        load_model(ModelSpec(path=str(folder)))
    assert not sprung.exists()


def test_a_vision_tower_in_a_pickle_is_refused_too(home, tmp_path, sprung):
    folder = tmp_path / "pickled"
    save_tiny(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    whole(folder, {"trap": Trap(sprung)})
    init = {"kind": "config", "config": config, "processor": str(home / "model"), "vision_tower": str(folder)}
    with pytest.raises(ModelError, match="pickle"):
        BetaKDJob(parse_spec(tree(home, str(tmp_path / "out"), student={"init": init}))).check()
    assert not sprung.exists()


def test_a_pickle_beside_safetensors_is_left_alone(home, tmp_path, sprung):
    save_tiny(tmp_path / "both")
    whole(tmp_path / "both", {"trap": Trap(sprung)})
    load_model(ModelSpec(path=str(tmp_path / "both")))
    assert not sprung.exists()


CODE = """
import os
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedTokenizerFast
os.makedirs({sprung!r}, exist_ok=True)

class OwnConfig(LlavaConfig):
    model_type = "own"

class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def with_code(folder: Path, sprung: Path, file: str) -> ModelSpec:
    """Write a model that requests, in one of its files, code from its own folder."""
    save_tiny(folder)
    (folder / "own.py").write_text(CODE.format(sprung=str(sprung)))
    if file == "config.json":
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
        rewrite(folder / file, auto_map=auto_map, model_type="own")
        # transformers renames a LLaVA's head as it loads it, but not that of a model of another type.
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights.pop("language_model.lm_head.weight")
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    else:
        auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"], "AutoProcessor": "own.OwnProcessor"}
        rewrite(folder / file, auto_map=auto_map, tokenizer_class="OwnTokenizer", processor_class="OwnProcessor")
    return ModelSpec(path=str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_beside_a_model_is_not_run_unless_the_spec_says_so_and_nobody_is_asked(
    tmp_path, sprung, monkeypatch, file
):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    spec = with_code(tmp_path / "own", sprung, file)
    # What transformers has a class for, it loads without; of a tokenizer it needs no more than tokenizer.json.
    refused = pytest.raises(ModelError, match=r"own: comes with code of its own.*trust_remote_code: true")
    with refused if file != "tokenizer_config.json" else nullcontext():
        load_config(spec) if file == "config.json" else load_processor(spec)
    assert not sprung.exists()
    assert not asked


def test_code_beside_a_model_runs_where_the_spec_says_so(tmp_path, sprung):
    spec = with_code(tmp_path / "own", sprung, "config.json").model_copy(update={"trust_remote_code": True})
    assert type(load_model(spec)).__name__ == "OwnModel"
    assert sprung.exists()
    assert type(model_skeleton(spec)).__name__ == "OwnModel"  # of which a forecast and a split read the sizes


def test_an_attention_kernel_from_a_hub_is_code_too(home, tmp_path):
    kernel = {"path": str(home / "model"), "attn_implementation": "somebody/kernel"}
    with pytest.raises(SpecError, match=r"attn_implementation.*trust_remote_code"):
        parse_spec(tree(home, str(tmp_path), teacher=kernel, objective={"energies": "fkl"}))
    trusted = {**kernel, "trust_remote_code": True}
    parse_spec(tree(home, str(tmp_path), teacher=trusted, objective={"energies": "fkl"}))


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_torch_does_not_obey_a_pickle_even_if_told_to(tmp_path, sprung):
    torch.save({"weights": torch.ones(2), "trap": Trap(sprung)}, tmp_path / "zipped.pt")
    torch.save({"trap": Trap(sprung)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Trap(sprung), protocol=2))
    for file in ("zipped.pt", "legacy.pt", "bare.pt"):
        with pytest.raises(OutputError, match=r"step-7: is not loaded.*posix\.mkdir"), tensors_only("step-7"):
            torch.load(tmp_path / file, weights_only=False)
    assert not sprung.exists()
    assert FORCE not in os.environ
    torch.load(tmp_path / "zipped.pt", weights_only=False)
    assert sprung.exists()


def _tampered(rank: int, folder: Path, spec: JobSpec) -> None:
    """Write the results of loading a checkpoint, and of loading it with a trap in each of its files."""
    os.environ["LOCAL_RANK"] = "0"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    learner = Learner(spec, None, total_steps=10)
    whole = folder / "checkpoint"
    whole.mkdir()
    learner.save(whole)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.pt"))
    said = {"whole": _outcome(lambda: learner.load(whole))}
    for file in files:
        content = (whole / file).read_bytes()
        state = torch.load(whole / file, weights_only=False)
        torch.save({**state, "trap": Trap(folder / "sprung")}, whole / file)
        said[str(file)] = _outcome(lambda: learner.load(whole))
        if file.name.endswith("optim_states.pt"):
            said["converted"] = _outcome(lambda: make_universal(whole))
        (whole / file).write_bytes(content)
    (folder / "said.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def _outcome(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def test_a_checkpoint_with_a_trap_in_any_file_is_refused_and_the_trap_not_sprung(home, tmp_path, sprung, monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "1")
    mp.spawn(_tampered, (tmp_path, parse_spec(tree(home, str(tmp_path / "out")))))
    said = json.loads((tmp_path / "said.json").read_text())
    assert said.pop("whole") == "done"
    assert {Path(file).name.split("_")[-1] for file in said} == {"beta.pt", "states.pt", "converted"}
    for file, outcome in said.items():
        assert outcome.startswith("OutputError: checkpoint: "), file
        assert "asks for posix.mkdir" in outcome, file
    assert not sprung.exists()


# ---- specs -------------------------------------------------------------------------------------------------------

HIDDEN = "hunter2/Xy+z"
URLS = [
    f"s3://AKIAEXAMPLE:{HIDDEN}@bucket/folder",
    f"https://user:{HIDDEN}@host/folder",
    f"https://{HIDDEN.replace('/', '')}@host/folder",
    f"https://bucket.host/a.tar?X-Amz-Expires=60&X-Amz-Signature={HIDDEN}",
    f"https://host/a.tar?sv=2024&sig={HIDDEN}",
]
FIELDS = {
    "data": lambda url: {"data": {"train": [url]}},
    "endpoint": lambda url: {"data": {"train": "a.tar", "storage": {"endpoint_url": url}}},
    "teacher": by_teacher,
    "student": lambda url: {"student": {"init": {"kind": "checkpoint", "path": url}}},
    "cache": lambda url: {"teacher": {"path": "org/a", "cache": url}, "objective": {"energies": "fkl"}},
    "cluster": lambda url: {"cluster": {"address": url}},
    "output": lambda url: {"output": {"path": url}},
    "a wrong type": lambda url: {"output": [url]},
    "a long wrong type": lambda url: {"output": ["." * 45, url]},
    "an unknown field": lambda url: {"outputs": url},
}


@pytest.mark.parametrize("url", URLS, ids=["s3", "userinfo", "token", "presigned", "sas"])
@pytest.mark.parametrize("field", FIELDS)
def test_a_url_with_a_credential_is_refused_and_not_repeated(home, field, url):
    with pytest.raises(SpecError) as caught:
        parse_spec(tree(home, "out", **FIELDS[field](url)))
    for part in (HIDDEN, HIDDEN.replace("/", ""), "hunter2", "Xy+z"):
        assert part not in str(caught.value)


def test_the_refusal_names_the_field_and_the_remedy(home):
    with pytest.raises(SpecError, match=r"output: holds a password.*AWS_ACCESS_KEY_ID"):
        parse_spec(tree(home, URLS[0]))
    with pytest.raises(SpecError, match=r"conversations: holds a password"):
        parse_spec({"conversations": URLS[0], "output": "out"}, PackSpec)
    with pytest.raises(SpecError, match=r"models\.a\.path: holds a password"):
        parse_spec({"name": "e", "data": {"train": "a.tar"}, "models": {"a": {"path": URLS[1]}}}, EvaluationSpec)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/train-?{00..07}.tar",
        "s3://bucket/2026-01-01T10:00@v1/*.tar",
        "abfs://container@account.dfs.core.windows.net/a.tar",
        "https://host:8443/a@b/a.tar?versionId=3",
    ],
)
def test_a_url_without_a_credential_is_not(home, url):
    assert parse_spec(tree(home, "out", data={"train": url})).data.paths == (url,)


@pytest.mark.parametrize(
    ("text", "override"),
    [
        (f"output: [{URLS[0]}", None),
        (f"output: @{URLS[0]}", None),
        ("name: job", f"name=[{URLS[0]}"),
        ("name: job", f"name.path={URLS[0]}"),
        (f"name: {URLS[0]}", "name.path=a"),
    ],
)
def test_a_file_or_override_that_cannot_be_read_is_not_repeated_with_its_credentials(tmp_path, text, override):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(SpecError) as caught:
        load_spec(file, [override] if override else [])
    assert "hunter2" not in str(caught.value)
    assert "Xy+z" not in str(caught.value)


def test_pydantic_s_own_error_does_not_repeat_it_either():
    with pytest.raises(ValidationError) as caught:
        OutputSpec(path=URLS[0])
    assert HIDDEN not in str(caught.value)


# ---- credentials of the environment ------------------------------------------------------------------------------


class Telltale(BaseHTTPRequestHandler):
    """Server that refuses every request; its answer repeats the request, and has secrets that were not in it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        headers = " ".join([*self.headers.values(), *CANARIES.values()])
        code = "NoSuchBucket" if self.server.status == 404 else "AccessDenied"  # type: ignore[attr-defined]
        body = f"<Error><Code>{code}</Code><Message>You sent {headers}</Message></Error>".encode()
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def telltale(status: int) -> Any:
    with ThreadingHTTPServer(("127.0.0.1", 0), Telltale) as server:
        server.status = status  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "region": "us-east-1"}
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def canaries(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.INFO)


def found(text: str) -> list[str]:
    return [name for name, value in CANARIES.items() if value in text]


BROKEN: dict[str, tuple[type[BetaKDError], Any]] = {
    "data": (DataError, lambda s: {"data": {"train": "s3://bucket/a.tar", "storage": s}}),
    "glob": (DataError, lambda s: {"data": {"train": "s3://bucket/*.tar", "storage": s}}),
    "model": (
        ModelError,
        lambda s: {"student": {"init": {"kind": "checkpoint", "path": "s3://bucket/m", "storage": s}}},
    ),
    "output": (OutputError, lambda s: {"output": {"path": "s3://bucket/runs", "storage": s}}),
}


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("part", BROKEN)
def test_what_a_store_tells_of_credentials_is_not_passed_on(home, tmp_path, canaries, caplog, capfd, part, status):
    kind, change = BROKEN[part]
    with telltale(status) as storage, pytest.raises(kind) as caught:
        BetaKDJob(parse_spec(tree(home, str(tmp_path / "out")) | change(storage))).check()
    said = str(caught.value)
    assert found(said + repr(caught.value) + caplog.text + "".join(capfd.readouterr())) == []
    assert "bucket" in said


def test_a_refusal_with_its_reason_is_told_with_blanks(home, tmp_path, canaries):
    change = BROKEN["glob"][1]
    with telltale(403) as storage, pytest.raises(DataError, match=r"You sent .*\*\*\*"):
        BetaKDJob(parse_spec(tree(home, str(tmp_path / "out")) | change(storage))).check()


def test_errors_about_models_and_fields_hold_no_credential(home, tmp_path, canaries, caplog, capfd):
    (tmp_path / "empty").mkdir()
    wrong = [
        by_teacher("org/private-model"),
        by_teacher(str(tmp_path / "empty")),
        {"data": {"train": str(tmp_path / "none.tar")}},
        {"training": {"worker": 2}},
        {"output": {"path": str(tmp_path), "storage": {"key": CANARIES["AWS_SECRET_ACCESS_KEY"]}}},
        {"output": [CANARIES["AWS_SECRET_ACCESS_KEY"]]},
    ]
    for change in wrong:
        with pytest.raises(BetaKDError) as caught:
            BetaKDJob(parse_spec(tree(home, str(tmp_path / "out"), **change))).check()
        assert found(str(caught.value)) == []
    assert found(caplog.text + "".join(capfd.readouterr())) == []


def test_an_error_stays_blank_on_its_way_between_processes(canaries, monkeypatch):
    sent = pickle.dumps(DataError(f"said {CANARIES['HF_TOKEN']} to s3://a:secret@b"))
    monkeypatch.delenv("HF_TOKEN")
    assert str(pickle.loads(sent)) == "said *** to s3://***@b"


# ---- results -----------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_result_is_in_safetensors_and_no_file_of_a_run_holds_a_credential(home, tmp_path, canaries, process_group):
    job = BetaKDJob(parse_spec(tree(home, str(tmp_path / "out"))))
    job.check()
    metrics = MetricsWriter(job.spec, job.run)
    metrics.log({"step": 1, "loss": 0.5})
    metrics.close()
    student = build_student(job.spec.student, torch.float32)
    processor = load_processor(ModelSpec(path=str(home / "model")))
    engine = SimpleNamespace(module=Distiller(student, processor, job.spec.objective, None))
    export_student(engine, job.spec, Permit(job.run, StorageSpec()), {"loss": 0.5})
    files = {path.name: path for path in Path(job.run).rglob("*") if path.is_file()}
    assert {"spec.json", "metrics.jsonl", "README.md", "config.json", "model.safetensors"} <= set(files)
    assert not [name for name in files if Path(name).suffix in {".bin", ".pt", ".pth", ".pkl", ".pickle"}]
    for path in files.values():
        assert found(path.read_bytes().decode("latin-1")) == [], path
    AutoModelForImageTextToText.from_pretrained(Path(job.run) / "model")
