"""One file of weights for several graphs.

Exported models are fused: the weights of a sub-tree are the first rows of the whole tree's packed weights. So the graph
of a small depth needs no weights of its own, only an offset and a length in the file of the largest: in ONNX's external
data and in OpenVINO's XML a graph can say so.
"""

from __future__ import annotations

from pathlib import Path

_ALIGNED = 64  # bytes: a cache line, which vector instructions like
_KEY = 64  # bytes that candidates are looked up by


class WeightFile:
    """Bytes that are stored once: what begins as something that is there already becomes a place in it.

    Give it the largest graph's weights first.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._places: dict[bytes, list[tuple[int, int]]] = {}  # by their first bytes: offset and length

    def place(self, content: bytes) -> int:
        """Where some bytes lie in the file, which takes them up if it does not hold them."""
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
