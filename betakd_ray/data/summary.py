"""What was seen in data: how many samples are good, which are bad and why, and what was not read."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

EXAMPLES = 10
"""Number of bad samples of one kind that a summary names."""
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S+|\d+")
"""Pattern of what differs between two faults of one kind: names, paths and numbers."""


@dataclass
class Summary:
    """Count of good and bad samples, with the first reasons of each kind."""

    good: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Kind of a fault → number of samples."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Kind of a fault → its first samples, each with its reason."""
    unread: Counter[str] = field(default_factory=Counter)
    """Extension of members that are not read, and are no media → their number."""
    apart: int = 0
    """Number of samples whose members do not stand beside one another."""

    @property
    def bad(self) -> int:
        return self.counts.total()

    @property
    def bad_fraction(self) -> float:
        return self.bad / max(1, self.good + self.bad)

    def add_bad(self, where: str, reason: str) -> None:
        """Count a sample that cannot be used."""
        kind = _PARTICULAR.sub("…", reason)
        self.counts[kind] += 1
        named = self.examples.setdefault(kind, [])
        if len(named) < EXAMPLES:
            named.append(f"{where}: {reason}")

    def lines(self) -> Iterator[str]:
        """Yield the summary, line by line."""
        yield f"{self.good + self.bad:,} samples: {self.good:,} good, {self.bad:,} bad"
        for kind, count in self.counts.most_common():
            yield f"  {count:,} bad:"
            yield from (f"    {example}" for example in self.examples[kind])
            if count > len(self.examples[kind]):
                yield f"    … and {count - len(self.examples[kind]):,} more of this kind"
        if self.unread:
            seen = ", ".join(f"{count:,} × .{name}" for name, count in self.unread.most_common(10))
            yield f"  members that are not read: {seen}"
        if self.apart:
            yield (
                f"  {self.apart:,} keys come twice: the members of a sample stand apart. Write the tar sorted by name: "
                "tar --sort=name -cf SHARD.tar FOLDER"
            )
