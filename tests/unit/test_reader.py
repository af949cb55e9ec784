"""One shard on its way to the job: what becomes rows, and what is reported as bad."""

import io

import pytest
from PIL import Image

import betakd_ray.data.reader as module
from betakd_ray.data.plan import Plan, Quarantined, ids_of
from betakd_ray.data.reader import Reader
from betakd_ray.data.render import Renderer
from betakd_ray.data.shards import Shard
from betakd_ray.errors import DataError, DataUnreachable, TooManyBadSamples
from betakd_ray.spec import DataSpec
from tests.tars import flip, record, tar_bytes, written
from tests.tiny import IMAGE_TOKENS, tiny_processor


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12), (200, 30, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(key, answer="A circle.", image=None):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
    return [(f"{key}.json", record(conversations=turns)), (f"{key}.png", png() if image is None else image)]


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(module, "_KEPT", module.KeptRows())


class Job:
    """A reader of one shard, and what it told the job."""

    def __init__(self, folder, samples, *, student_length=2048, teacher_length=None, epochs=2, **data):
        self.shard = written(folder, tar_bytes([member for each in samples for member in each]))
        self.plan = Plan((self.shard,), epochs, seed=0, shuffle=True)
        self.bad: list[Quarantined] = []
        self.fatal = []
        spec = DataSpec.model_validate({"train": self.shard.url, "system_prompt": "", **data})
        lengths = {"student": student_length} | ({"teacher": teacher_length} if teacher_length else {})
        views = {view: spec.model_copy(update={"max_length": length}) for view, length in lengths.items()}
        renderers = {view: Renderer(tiny_processor(), data) for view, data in views.items()}
        self.reader = Reader(self.plan, spec, renderers, self.report, self.fatal.append)

    def report(self, bad):
        self.bad += bad
        return len(self.bad) / self.plan.samples

    def rows(self, epoch=0, done=()):
        ledger = self.plan.empty_ledger()
        ledger.add(ids_of([Quarantined(epoch, 0, index, "", "") for index in done]))
        blocks = self.reader.blocks(epoch, 0, 1, ledger, rows=256, size=1 << 24)
        return [row for block in blocks for row in block.to_pylist()]


def test_every_sample_becomes_a_row_or_a_record_with_its_reason(tmp_path):
    samples = [sample("a"), sample("b", image=b"no image"), sample("c"), sample("d", answer=" ")]
    job = Job(tmp_path, samples, max_bad_fraction=1)
    assert sorted(row["index"] for row in job.rows(epoch=1)) == [0, 2]
    assert sorted((bad.epoch, bad.shard, bad.index, bad.key) for bad in job.bad) == [(1, 0, 1, "b"), (1, 0, 3, "d")]
    reasons = {bad.key: bad.reason for bad in job.bad}
    assert "cannot be decoded" in reasons["b"]
    assert "no answer" in reasons["d"]
    assert job.fatal == []


def test_more_bad_samples_than_allowed_stop_the_job_and_name_one(tmp_path):
    samples = [sample("a"), sample("b", image=b""), sample("c"), sample("d")]
    message = r"12\.50% of the planned.*max_bad_fraction 12\.49%.*b of .*train-0\.tar: image cannot be decoded"
    job = Job(tmp_path, samples, max_bad_fraction=0.1249)
    with pytest.raises(TooManyBadSamples, match=message):
        job.rows()
    assert [type(error) for error in job.fatal] == [TooManyBadSamples]
    assert len(Job(tmp_path, samples, max_bad_fraction=0.125).rows()) == 3


def test_a_damaged_shard_stops_the_job_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("betakd_ray.data.shards.BACKOFF.wait_funcs", ())  # no pauses
    job = Job(tmp_path, [sample("a"), sample("b")])
    flip(tmp_path / "train-0.tar", 600)
    with pytest.raises(DataError, match=r"train-0\.tar.*Copy or pack it again"):
        job.rows()
    assert len(job.fatal) == 1


def test_a_store_that_does_not_answer_does_not_end_the_job(tmp_path, monkeypatch):
    """The students restart, and read again what is left."""

    def unreachable(*_):
        raise DataUnreachable("no answer")

    job = Job(tmp_path, [sample("a")])
    with monkeypatch.context() as outage:
        outage.setattr("betakd_ray.data.shards.BACKOFF.wait_funcs", ())  # no pauses
        outage.setattr("betakd_ray.data.shards.opened", unreachable)
        with pytest.raises(DataUnreachable):
            job.rows()
    assert job.fatal == []
    assert [row["key"] for row in job.rows()] == ["a"]


def test_an_answer_beyond_max_length_is_cut_and_what_fits_is_trained_on(tmp_path):
    samples = [sample("a", answer="yes " * 100)]
    whole, cut = Job(tmp_path, samples).rows()[0], Job(tmp_path, samples, student_length=64).rows()[0]
    assert len(whole["student_input_ids"]) > 64
    assert cut["student_input_ids"] == whole["student_input_ids"][:64]
    assert cut["student_answer_mask"] == whole["student_answer_mask"][:64]
    assert cut["student_answer_mask"][-1]


def test_an_answer_that_begins_beyond_max_length_is_quarantined(tmp_path):
    job = Job(tmp_path, [sample("a")], student_length=IMAGE_TOKENS + 8, max_bad_fraction=1)
    assert job.rows() == []
    assert "no answer token within max_length" in job.bad[0].reason


def test_an_answer_that_teacher_and_student_cut_at_different_tokens_is_quarantined(tmp_path):
    long, short = sample("a", answer="yes " * 100), sample("b", answer="yes")
    job = Job(tmp_path, [long, short], student_length=64, teacher_length=2048, max_bad_fraction=1)
    assert [row["key"] for row in job.rows()] == ["b"]
    assert "do not have the same answer tokens" in job.bad[0].reason


def test_a_small_set_is_rendered_once_and_comes_as_if_it_were_read_again(tmp_path, monkeypatch):
    samples = [sample("a"), sample("b", image=b"no image"), *(sample(f"c{i}", answer=f"{i}.") for i in range(6))]
    job, later = (Job(tmp_path, samples, max_bad_fraction=1, shuffle_buffer=3) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(module, "KEPT_BYTES", 0)
        expected, rest = job.rows(epoch=1), job.rows(epoch=1, done=(2, 5))
    first = job.rows(epoch=0)
    (tmp_path / "train-0.tar").unlink()
    job.bad.clear()
    assert job.rows(epoch=1) == expected
    assert [row["index"] for row in expected] != [row["index"] for row in first]
    assert [(bad.epoch, bad.index, bad.key) for bad in job.bad] == [(1, 1, "b")]
    assert job.rows(epoch=1, done=(2, 5)) == rest
    assert later.rows(epoch=1) == expected


@pytest.mark.parametrize("other", [{"student_length": 64}, {"system_prompt": "Look."}])
def test_what_another_template_rendered_is_not_taken(tmp_path, other):
    Job(tmp_path, [sample("a")]).rows()
    job = Job(tmp_path, [sample("a")], **other)
    (tmp_path / "train-0.tar").unlink()
    with pytest.raises(DataError, match="train-0"):
        job.rows()


@pytest.mark.parametrize(("epochs", "limit"), [(1, 1 << 20), (2, 1000), (2, 11_000)])
def test_what_is_read_once_or_is_large_is_not_kept(tmp_path, monkeypatch, epochs, limit):
    monkeypatch.setattr(module, "KEPT_BYTES", limit)
    monkeypatch.setattr(module.Row, "bytes", 6000)  # two are above each limit but the first; their tar has 10,240
    job = Job(tmp_path, [sample("a"), sample("b")], epochs=epochs)
    job.rows(epoch=0)
    (tmp_path / "train-0.tar").unlink()
    with pytest.raises(DataError, match="train-0"):
        job.rows(epoch=0)


def test_sets_that_were_not_asked_for_lately_make_room(monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 100)
    kept, shards = module.KeptRows(), [Shard(f"{n}.tar", 1, 1, "") for n in range(3)]
    rows = [module.Refusal(0, "k" * 20, "r" * 20)]
    for rendering, shard in (("a", 0), ("b", 0), ("b", 1), ("b", 2)):
        kept.keep(rendering, shards[shard], rows)
    assert kept.find("a", shards[0]) is None
    assert [kept.find("b", shard) for shard in shards] == [rows, rows, None]  # a set does not make room for itself
    kept.keep("c", shards[0], [*rows, *rows])
    assert kept.find("b", shards[0]) is None
    assert kept.find("c", shards[0]) == [*rows, *rows]
