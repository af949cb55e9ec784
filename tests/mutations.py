"""Random changes to the bytes of a file. Each takes the content and a `random.Random`."""


def place(content, rng):
    """Return (start, end) of a random range in the content."""
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice([1, 2, 8, 64, 600]))


def flip(content, rng):
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 64]) if content else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite(content, rng):
    start, end = place(content, rng)
    return content[:start] + rng.randbytes(end - start) + content[end:]


def zero(content, rng):
    start, end = place(content, rng)
    return content[:start] + bytes(end - start) + content[end:]


def delete(content, rng):
    start, end = place(content, rng)
    return content[:start] + content[end:]


def insert(content, rng):
    start, end = place(content, rng)
    run = rng.choice([rng.randbytes(end - start), bytes(end - start), content[start:end]])
    return content[:start] + run + content[start:]


def truncate(content, rng):
    return content[: rng.randrange(len(content) + 1)]


BYTES = [flip, overwrite, zero, delete, insert, truncate]
