"""The zip archive of a `.pt2`: entries stored as they are, aligned, each with its digest.

It is written here and not by torch, whose writer ends the process when the disk is full, and read here and not by torch,
so that what was checked is what is read. In an archive of this package each byte is covered: ``rewrite/digests.json`` has
the SHA-256 of every other entry, and the zip's comment that of all bytes outside of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rewrite.errors import RewriteError

from .checked import parsed, shown, table

DIGESTS = "rewrite/digests.json"
_ALIGNMENT = 64
_CHUNK = 1 << 24
_MARK = b"rewrite sha256 "
_LOCAL = struct.Struct("<4s5H3I2H")
_DATE = (1980, 1, 1, 0, 0, 0)
_ZIP64 = (1 << 31) - 1
_ENTRIES = 1_000_000


class Writer:
    """Writes an archive; its folder inside is called ``root``."""

    def __init__(self, path: Path, root: str) -> None:
        self._path = path
        self._root = root
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._digests: dict[str, str] = {}
        self._beside = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._beside.shutdown()
        if kind is not None:
            file: IO[bytes] | None = self._zip.fp
            self._zip.fp = None  # or it would write the end of an archive that has none
            with contextlib.suppress(OSError):  # the first failure is the one to tell
                if file is not None:
                    file.close()
            return
        self._add(DIGESTS, json.dumps(self._digests).encode())
        self._zip.comment = _MARK + bytes(64)
        self._zip.close()
        self._sign()

    def add(self, name: str, content: bytes | memoryview) -> None:
        """Store an entry. Raises OSError where the disk refuses it."""
        digest = self._beside.submit(hashlib.sha256, content)  # takes as long as writing, and neither holds up the other
        self._add(name, content)
        self._digests[name] = digest.result().hexdigest()

    def _add(self, name: str, content: bytes | memoryview) -> None:
        size = len(content) if isinstance(content, bytes) else content.nbytes
        info = zipfile.ZipInfo(f"{self._root}/{name}", _DATE)
        info.file_size = size
        large = size * 1.05 > _ZIP64
        head = self._zip.start_dir + _LOCAL.size + len(info.filename.encode()) + 4 + (20 if large else 0)
        padding = -head % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
        with self._zip.open(info, "w", force_zip64=large) as entry:
            entry.write(content)

    def _sign(self) -> None:
        """Replace the placeholder at the end by the digest of all that is no entry's content."""
        with self._path.open("r+b") as file:
            digest = Archive(file).frame_digest().encode()
            file.seek(-len(digest), 2)
            file.write(digest)


@dataclass(frozen=True)
class Entry:
    """Where an entry's content lies in the file."""

    name: str
    start: int
    size: int


class Archive:
    """An archive as it was read: entries by their name below the root. Nothing is decompressed or extracted.

    Raises RewriteError unless it is what torch writes: entries in one folder, stored, none twice, none outside, no gaps
    that hide another archive.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digests: Mapping[str, Any] | None = None
        self._read: set[str] = set()
        self._length = file.seek(0, 2)
        try:
            with zipfile.ZipFile(file) as archive:
                self.comment = archive.comment
                self.entries = self._checked(archive.infolist(), archive.start_dir)
        except (zipfile.BadZipFile, struct.error, UnicodeError, NotImplementedError, ValueError, EOFError):
            raise RewriteError("its archive is damaged or cut short") from None

    def _checked(self, infos: Sequence[zipfile.ZipInfo], end: int) -> dict[str, Entry]:
        if len(infos) > _ENTRIES:
            raise RewriteError(f"its archive has {len(infos)} entries")
        found: dict[str, Entry] = {}
        roots = set()
        place = 0
        for info in sorted(infos, key=lambda each: each.header_offset):
            root, _, name = info.orig_filename.partition("/")
            roots.add(root)
            if info.header_offset < place or (place == 0 and info.header_offset != 0):
                raise RewriteError(f"the entry {shown(name)} of its archive overlaps another")
            entry = self._entry(info, name)
            place = entry.start + entry.size
            if place > end or name in found:
                raise RewriteError(f"the entry {shown(name)} of its archive is there twice or reaches beyond its end")
            found[name] = entry
        if len(roots) != 1:
            raise RewriteError("its archive has no single folder, as those of torch have")
        return found

    def _entry(self, info: zipfile.ZipInfo, name: str) -> Entry:
        parts = info.orig_filename.split("/")
        odd = any(part in ("", ".", "..") or "\\" in part or not part.isprintable() or ":" in part for part in parts)
        if odd or len(parts) < 2 or len(info.orig_filename) > 1000:
            raise RewriteError(f"its archive has the entry {shown(info.orig_filename)}, which leads elsewhere")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 0x2041:
            raise RewriteError(f"the entry {shown(name)} of its archive is compressed or encrypted, which torch does not do")
        self._file.seek(info.header_offset)
        head = _LOCAL.unpack(self._file.read(_LOCAL.size))
        local = self._file.read(head[9])
        if head[0] != b"PK\x03\x04" or local != info.orig_filename.encode() or head[3] != zipfile.ZIP_STORED:
            raise RewriteError(f"the entry {shown(name)} of its archive has two names")
        return Entry(name, info.header_offset + _LOCAL.size + head[9] + head[10], info.file_size)

    @property
    def is_signed(self) -> bool:
        """Whether this package wrote it."""
        return DIGESTS in self.entries

    def check_signature(self) -> None:
        """Read the digests. Raises RewriteError where a byte outside of the entries is another than was written."""
        if self.comment != _MARK + self.frame_digest().encode():
            raise RewriteError("it is damaged: its digest is not that of its content")
        self._digests = table(parsed(self.read(DIGESTS), "digests"), "digests")
        if self._digests.keys() != self.entries.keys() - {DIGESTS}:
            raise RewriteError("it is damaged: its digests are of other entries")

    def frame_digest(self) -> str:
        """SHA-256 of all bytes but the signed entries' contents and the digest itself at the end."""
        digest, place = hashlib.sha256(), 0
        signed = sorted((e for e in self.entries.values() if e.name != DIGESTS), key=lambda e: e.start)
        for start, stop in [(e.start, e.start + e.size) for e in signed] + [(self._length - 64, self._length)]:
            for chunk in self._chunks(place, start):
                digest.update(chunk)
            place = stop
        return digest.hexdigest()

    def _chunks(self, start: int, stop: int) -> Iterator[bytes]:
        self._file.seek(start)
        while start < stop:
            chunk = self._file.read(min(_CHUNK, stop - start))
            if not chunk:
                raise RewriteError("its archive is cut short")
            start += len(chunk)
            yield chunk

    def read(self, name: str, limit: int = 1 << 31) -> bytes:
        """An entry's content, checked against its digest."""
        entry = self._found(name)
        if entry.size > limit:
            raise RewriteError(f"its entry {shown(name)} is larger than any program's")
        content = bytearray(entry.size)
        self.read_into(name, memoryview(content))
        return bytes(content)

    def read_into(self, name: str, buffer: memoryview) -> None:
        """As ``read``, into a buffer of the entry's size."""
        entry = self._found(name)
        self._file.seek(entry.start)
        digest, place = hashlib.sha256(), 0
        while place < entry.size:
            count = self._file.readinto(buffer[place : place + _CHUNK])  # type: ignore[attr-defined]
            if not count:
                raise RewriteError("its archive is cut short")
            digest.update(buffer[place : place + count])
            place += count
        if self._digests is not None and name != DIGESTS and digest.hexdigest() != self._digests.get(name):
            raise RewriteError(f"it is damaged: the entry {name} has another digest than was written")
        self._read.add(name)

    def check_rest(self) -> None:
        """Check the digests of what nobody has read. Raises RewriteError for an entry that is another than was written."""
        for name in self.entries.keys() - self._read - {DIGESTS}:
            self.read_into(name, memoryview(bytearray(self._found(name).size)))

    def size(self, name: str) -> int:
        return self._found(name).size

    def _found(self, name: str) -> Entry:
        if name not in self.entries:
            raise RewriteError(f"its archive lacks the entry {shown(name)}")
        return self.entries[name]
