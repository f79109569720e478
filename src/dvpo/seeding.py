"""Seeds by name: whatever is drawn is keyed by what it is for, so order, batch size and resume do not matter."""

import hashlib


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text; stable over machines and Python versions."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derive_uniform(*parts: object) -> float:
    """A number of [0, 1) from the parts' text, on the grid of 2^-53."""
    return (derive_seed(*parts) >> 10) / (1 << 53)
