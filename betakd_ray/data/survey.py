"""A look at all samples of a shard, before its manifest is written: which would be quarantined, and why."""

import re

from betakd_ray.data.files import opened
from betakd_ray.data.media import IMAGE_NAME
from betakd_ray.data.samples import BadSample, TarMembers, parse_sample
from betakd_ray.data.shards import Shard, groups, tar_errors
from betakd_ray.data.summary import Summary
from betakd_ray.spec import StorageSpec

Survey = Summary
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF....WEBP|GIF8|BM|II\x2a\0|MM\0\x2a|II\x2b\0|MM\0\x2b", re.DOTALL
)


def survey_shard(url: str, storage: StorageSpec, survey: Survey) -> Shard:
    """Read a shard that no manifest describes, add what is seen to `survey`, and return its entry for a manifest.

    Images are not decoded. Raises ShardDamaged or DataUnreachable.
    """
    places = dict[str, int]()
    samples = 0
    with opened(url, storage) as stream, tar_errors(url):
        for group in groups(stream, lambda index: True):
            samples += 1
            first = places.setdefault(group.key, group.index)
            if first < group.index:
                survey.apart += 1
                group.fault = group.fault or f"key {group.key!r} occurs twice, first as sample {first}"
            _look(group, url, survey)
    return Shard(url, samples, stream.size, stream.checksum)


def _look(group: TarMembers, url: str, survey: Survey) -> None:
    parsed = parse_sample(group)
    reason = parsed.reason if isinstance(parsed, BadSample) else _no_image(group)
    if reason is None:
        survey.good += 1
        read = ("json", "txt")  # a txt beside a conversation says the same in most sets
        survey.unread.update(name for name in group.members if name not in read and not IMAGE_NAME.fullmatch(name))
    else:
        survey.add_bad(f"{url}, sample {group.index} ({group.key})", reason)


def _no_image(group: TarMembers) -> str | None:
    """Return why a member that should be an image is none, by its first bytes."""
    for name, content in group.members.items():
        if IMAGE_NAME.fullmatch(name) and not _MAGIC.match(content):
            return f"the member '{group.key}.{name}' is no image: it begins with '{content[:12]!r}'"
    return None
