"""JPEG files without the segments that could cost the photo, as Pillow gets them."""

_START_OF_SCAN = 0xDA
_APP0, _APP2, _APP13, _APP14 = 0xE0, 0xE2, 0xED, 0xEE
_STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})
# What Pillow reads of a segment without looking how long it is, with the bytes that it needs.
_NEEDED = {_APP0: (b"JFIF", 7), _APP2: (b"ICC_PROFILE\0", 14), _APP14: (b"Adobe", 12)}


def strip_jpeg(data: bytes) -> bytes:
    """The file without segments that Pillow stumbles over: too short ones, and Photoshop's resources.

    A file of an unexpected structure stays as it is: the decoder judges it.
    """
    kept, position, copied = [], 2, 0
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker in _STANDALONE:
            position += 2
            continue
        if marker == _START_OF_SCAN:
            break
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4])
        if _is_harmful(marker, data[position + 4 : min(end, position + 64)]):
            kept.append(data[copied:position])
            copied = end
        position = end
    return b"".join([*kept, data[copied:]]) if kept else data


def _is_harmful(marker: int, start: bytes) -> bool:
    name, num_bytes = _NEEDED.get(marker, (b"", 0))
    return marker == _APP13 or (len(start) < num_bytes and start.startswith(name))
