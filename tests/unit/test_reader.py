"""Reading of one shard for a job: its rows, and its samples that are reported as bad."""

import io

import pytest
from PIL import Image

import betakd_ray.data.reader as module
from betakd_ray.batch.sample import Stored
from betakd_ray.data.plan import Plan, Quarantined, ids_of
from betakd_ray.data.reader import Reader
from betakd_ray.data.render import Renderer
from betakd_ray.data.rows import samples_of
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
    """A reader of one shard, and its reports to the job."""

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
    monkeypatch.setattr(
        module.RenderedSample, "bytes", 6000
    )  # two are above each limit but the first; their tar has 10,240
    job = Job(tmp_path, [sample("a"), sample("b")], epochs=epochs)
    job.rows(epoch=0)
    (tmp_path / "train-0.tar").unlink()
    with pytest.raises(DataError, match="train-0"):
        job.rows(epoch=0)


def test_sets_that_were_not_asked_for_lately_make_room(monkeypatch):
    monkeypatch.setattr(module, "KEPT_BYTES", 100)
    kept, shards = module.KeptRows(), [Shard(f"{n}.tar", 1, 1, "") for n in range(3)]
    rows = [module.RefusedSample(0, "k" * 20, "r" * 20)]
    for rendering, shard in (("a", 0), ("b", 0), ("b", 1), ("b", 2)):
        kept.keep(rendering, shards[shard], rows)
    assert kept.find("a", shards[0]) is None
    assert [kept.find("b", shard) for shard in shards] == [rows, rows, None]  # a set does not make room for itself
    kept.keep("c", shards[0], [*rows, *rows])
    assert kept.find("b", shards[0]) is None
    assert kept.find("c", shards[0]) == [*rows, *rows]


# ------------------------------------------------------------------------------------------- groups of shards


class Group:
    """A reader of several shards of ten samples, which are told apart by their keys."""

    def __init__(self, folder, count=4, samples=10, *, parts=(), locate=None, **data):
        self.shards = [
            written(folder, tar_bytes([m for s in range(samples) for m in sample(f"{n}-{s}")]), f"{n}.tar")
            for n in range(count)
        ]
        data = {"train": str(folder / "*.tar"), "shuffle_buffer": 5, "system_prompt": "", **data}
        spec = DataSpec.model_validate(data)
        self.plan = Plan(tuple(self.shards), 2, seed=0, shuffle=spec.shuffle, parts=parts)
        renderers = {"student": Renderer(tiny_processor(), spec)}
        self.reader = Reader(self.plan, spec, renderers, lambda bad: 0.0, lambda error: None, locate)

    def blocks(self, epoch=0, done=None, rows=7, size=1 << 24):
        done = done or self.plan.empty_ledger()
        return list(self.reader.blocks(epoch, 0, len(self.shards), done, rows, size))

    def keys(self, **how):
        return [key for block in self.blocks(**how) for key in block["key"].to_pylist()]


def ids(blocks):
    return [block.select(["epoch", "shard", "index", "member", "key"]).to_pydict() for block in blocks]


def test_the_shards_of_a_group_are_mixed_and_each_sample_comes_once(tmp_path):
    group = Group(tmp_path)
    keys = group.keys()
    assert sorted(keys) == sorted(f"{n}-{s}" for n in range(4) for s in range(10))
    assert all(len({key[0] for key in keys[at : at + 10]}) >= 3 for at in range(0, 40, 10))
    assert group.keys() == keys
    assert group.keys(epoch=1) != keys


def test_without_shuffling_the_shards_come_one_after_the_other(tmp_path):
    group = Group(tmp_path, shuffle=False)
    assert group.keys() == [f"{n}-{s}" for n in range(4) for s in range(10)]


def test_only_a_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIXED_SHARDS", 2)
    now, most = set(), []
    read = module.read_shard_with_retry

    def watched(shard, *args, **kwargs):
        now.add(shard)
        most.append(len(now))
        yield from read(shard, *args, **kwargs)
        now.remove(shard)

    monkeypatch.setattr(module, "read_shard_with_retry", watched)
    assert len(Group(tmp_path).keys()) == 40
    assert max(most) == 2
    assert now == set()


def test_a_read_task_gives_the_same_blocks_whatever_the_cache_holds(tmp_path):
    """Ray Data resumes a repeated task by the number of its blocks, so other blocks would lose or repeat rows."""
    known = {}
    group = Group(tmp_path, locate=lambda shard: known.get(shard, {}))
    size = sum(block.nbytes for block in group.blocks()) // 6
    before = group.blocks(rows=100, size=size)
    known |= {shard: {m: Stored("parts/" + "f" * 60, 10**12, 10**9) for m in range(0, 10, 2)} for shard in group.shards}
    after = group.blocks(rows=100, size=size)
    assert len(before) > 3
    assert ids(before) == ids(after)
    assert [block.nbytes for block in before] == [block.nbytes for block in after]
    stored = {sample.key: sample.stored for block in after for sample in samples_of(block)}
    assert {key for key, place in stored.items() if place} == {f"{n}-{s}" for n in range(4) for s in range(0, 10, 2)}
    assert not any(sample.stored for block in before for sample in samples_of(block))


def test_a_block_has_no_more_rows_and_bytes_than_asked_for(tmp_path):
    group = Group(tmp_path)
    assert [block.num_rows for block in group.blocks(rows=7)] == [7] * 5 + [5]
    of_one = sum(block.nbytes for block in group.blocks()) / 40
    rows = [block.num_rows for block in group.blocks(rows=100, size=int(4.5 * of_one))]
    assert 5 <= max(rows) <= 7  # a row is a little larger in a block than it is taken for
    assert len(set(rows[:-1])) == 1


def test_what_is_done_is_not_read_again(tmp_path):
    group = Group(tmp_path)
    done = group.plan.empty_ledger()
    places = [(0, 2, index) for index in range(10)] + [(0, 1, 3)]
    done.add(ids_of([Quarantined(*place, "", "") for place in places]))
    (tmp_path / "2.tar").unlink()
    left = group.keys(done=done)
    assert sorted(left) == sorted({f"{n}-{s}" for n in (0, 1, 3) for s in range(10)} - {"1-3"})


def test_a_part_of_a_shard_is_the_window_of_its_epoch(tmp_path):
    group = Group(tmp_path, count=2, parts=((1, 4),))
    samples = [each for block in group.blocks(epoch=1) for each in samples_of(block)]
    assert len(samples) == 14
    part = {each.index: each.member for each in samples if each.shard == 1}
    assert [part[index] for index in range(4)] == group.plan.members(1, 1).tolist()
    assert all(each.key == f"{each.shard}-{each.member}" for each in samples)
    assert all(each.index == each.member for each in samples if each.shard == 0)


def test_a_damaged_shard_of_a_group_is_found_though_all_its_samples_came(tmp_path, monkeypatch):
    monkeypatch.setattr("betakd_ray.data.shards.BACKOFF.wait_funcs", ())  # no pauses
    group = Group(tmp_path)
    content = (tmp_path / "3.tar").read_bytes()
    (tmp_path / "3.tar").write_bytes(content[:-512])
    with pytest.raises(DataError, match=r"3\.tar: expected"):
        group.blocks()
