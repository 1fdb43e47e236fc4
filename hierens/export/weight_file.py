"""One file of weights for several graphs.

Exported models are fused: the weights of a sub-tree are the first rows of the whole tree's packed weights. The graph of
a small depth therefore needs only offsets and lengths in the weights of the largest depth, which ONNX's external data
and OpenVINO's XML support.
"""

from __future__ import annotations

from pathlib import Path

_ALIGNED = 64  # bytes: a cache line, fast for vector instructions
_KEY = 64  # bytes by which candidates are looked up


class WeightFile:
    """Stores tensors once: bytes that are the beginning of a stored tensor are not stored again.

    Add the largest graph's weights first.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._places: dict[bytes, list[tuple[int, int]]] = {}  # by their first bytes: offset and length

    def place(self, content: bytes) -> int:
        """The offset of some bytes in the file; they are added if they are not there."""
        candidates = self._places.setdefault(content[:_KEY], [])
        for offset, length in candidates:
            if length >= len(content) and self._data[offset : offset + len(content)] == content:
                return offset
        self._data += bytes(-len(self._data) % _ALIGNED)
        offset = len(self._data)
        self._data += content
        candidates.append((offset, len(content)))
        return offset

    def __len__(self) -> int:
        return len(self._data)

    def write(self, file: Path) -> None:
        """Write the file."""
        file.write_bytes(self._data)
