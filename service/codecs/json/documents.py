"""JSON objects with a long list and a few fields beside it, in and out.

Python's values take up to a hundred times the bytes of the JSON that they come from, and a parser keeps the
interpreter until it is done. So the list is set apart as it stands, for a reader that knows its items and
reads them in slices. A parser sees only the short rest.
"""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from service.errors import MalformedError, OptionError, TooLargeError, describe_validation

Document = TypeVar("Document", bound=BaseModel)
Items = TypeVar("Items")

MAX_FIELDS_BYTES = 16 * 1024
"""Most bytes of a document before its list, and of all that is not its list."""

_OTHER_MARKS = (
    codecs.BOM_UTF16_LE,
    codecs.BOM_UTF16_BE,
    codecs.BOM_UTF32_BE,
)  # UTF-32-LE begins as UTF-16-LE
_LIST_OF = rb'"%s"[ \t\r\n]*:[ \t\r\n]*(?=\[[ \t\r\n]*[^\] \t\r\n])'  # one that is not empty


def looks_like_json(data: bytes) -> bool:
    """Whether the first bytes are those of a JSON object."""
    return data[:MAX_FIELDS_BYTES].removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n").startswith(b"{")


def read_document(
    data: bytes,
    document: type[Document],
    name: str,
    placeholder: bytes,
    read_list: Callable[[bytes, int], tuple[Items, int]],
) -> tuple[Document, Items]:
    """The fields of a JSON object, and what its long list holds.

    Args:
        data: the object, in UTF-8.
        document: its fields.
        name: of the field with the long list.
        placeholder: a short valid list, which ``document`` gets in its place.
        read_list: given the data and the place of the list's opening bracket, it reads the list, and says
            where it ends.

    Raises:
        ServiceError: malformed, too large, or with other fields than ``document`` has.
    """
    if data.startswith(_OTHER_MARKS):
        raise MalformedError("The body is not valid JSON: it is UTF-16 or UTF-32, and JSON is sent as UTF-8.")
    start = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    found = re.compile(_LIST_OF % name.encode()).search(data, start, start + MAX_FIELDS_BYTES)
    if found is None:
        if len(data) > MAX_FIELDS_BYTES:
            raise MalformedError(
                f"The body is not valid JSON of this kind: no list {name!r} begins in its first "
                f"{MAX_FIELDS_BYTES} bytes."
            )
        _parse(document, data[start:])
        raise OptionError(f"The field {name!r} is missing.")  # its name was written with escapes
    items, end = read_list(data, found.end())
    if found.end() - start + len(data) - end > MAX_FIELDS_BYTES:
        raise TooLargeError(f"The fields beside {name!r} have more than {MAX_FIELDS_BYTES} bytes.")
    return _parse(document, data[start : found.end()] + placeholder + data[end:]), items


def write_document(fields: BaseModel, lists: Mapping[str, Iterable[bytes]]) -> bytes:
    """Write a JSON object of which some fields are long lists.

    Args:
        fields: the other fields, those that were set; values under the lists' names are left out.
        lists: by the name of the field, the text between the list's brackets in pieces.
    """
    text = io.BytesIO()  # grows in place, and gives what it holds without a copy
    text.write(to_json(fields.model_dump(exclude=set(lists), exclude_unset=True)).removesuffix(b"}"))
    for name, pieces in lists.items():
        text.write(b',"%s":[' % name.encode())
        text.writelines(pieces)
        text.write(b"]")
    text.write(b"}")
    return text.getvalue()


def unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The members of a JSON object, for ``json.loads(..., object_pairs_hook=unique_names)``.

    Raises:
        ValueError: a name that is there twice; which of the two counts, no two readers agree on.
    """
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("an object has two members of one name")
    return members


def _parse(document: type[Document], data: bytes) -> Document:
    try:
        json.loads(data, object_pairs_hook=unique_names)
        return document.model_validate_json(data)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise _invalid(first["msg"].removeprefix("Invalid JSON: ")) from exc
        raise OptionError(describe_validation(first, "field")) from exc
    except json.JSONDecodeError as exc:
        raise _invalid(exc.msg) from exc
    except RecursionError as exc:
        raise _invalid("it is nested too deeply") from exc
    except ValueError as exc:  # not UTF-8, a number of thousands of digits, or one of ours
        raise _invalid(str(exc)) from exc


def _invalid(reason: str) -> MalformedError:
    return MalformedError(f"The body is not valid JSON: {reason}.")
