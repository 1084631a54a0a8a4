"""Documents of which only parts are targets of the loss, such as answers after prompts."""

from typing import Self


class Marked(bytes):
    """A document as UTF-8, of which the bytes in `targets` are targets of the loss: pairs (start, stop), in rising
    order. An EOS after the document is one if the last byte is."""

    targets: tuple[tuple[int, int], ...]

    @classmethod
    def joined(cls, parts: list[tuple[bytes, bool]]) -> Self:
        """The document of these parts: their texts, and whether they are targets."""
        found, targets = cls(b"".join(text for text, _ in parts)), []
        at = 0
        for text, is_target in parts:
            if is_target and text:
                targets.append((at, at + len(text)))
            at += len(text)
        found.targets = tuple(targets)
        return found


def parts_of(document: bytes) -> list[tuple[bytes, bool]]:
    """The parts of a document, in order: their texts, none empty, and whether they are targets."""
    targets = getattr(document, "targets", ((0, len(document)),))
    parts, at = [], 0
    for start, stop in targets:
        parts += [(document[at:start], False), (document[start:stop], True)]
        at = stop
    parts.append((document[at:], False))
    return [(bytes(text), is_target) for text, is_target in parts if text]
