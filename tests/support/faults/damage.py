"""Damage to one file, drawn by a seed and named so that it can be done again."""

import os
import pathlib
import random

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{:064x}\nsize {}\n"


def apply(path: pathlib.Path, fault: dict) -> None:
    """Does the damage that `fault` describes: `how`, and what that takes.

    flip: of the bit `bit` of the byte `at`.  cut: all from the byte `at` on.
    zeros: in place of all from the byte `at` on.  gone: the file.
    """
    content = bytearray(path.read_bytes())
    match fault["how"]:
        case "flip":
            content[fault["at"]] ^= 1 << fault["bit"]
        case "cut":
            del content[fault["at"] :]
        case "zeros":
            content[fault["at"] :] = bytes(len(content) - fault["at"])
        case "gone":
            path.unlink()
            return
    path.write_bytes(content)


def draw(rng: random.Random, path: pathlib.Path, how: str) -> dict:
    """A fault for `apply`."""
    size = path.stat().st_size
    if how == "gone":
        return {"how": how}
    fault = {"how": how, "at": rng.randrange(size)}
    return fault | {"bit": rng.randrange(8)} if how == "flip" else fault


def replace(path: pathlib.Path, by: str, rng: random.Random) -> None:
    """Something else stands where a file was: fifo, folder, loop, lfs, empty,
    noise, nothing."""
    size = path.stat().st_size
    path.unlink()
    match by:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "lfs":
            path.write_text(LFS.format(rng.getrandbits(256), size))
        case "empty":
            path.touch()
        case "noise":
            path.write_bytes(rng.randbytes(min(size, 4096)))
