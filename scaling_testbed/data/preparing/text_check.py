"""Whether a tokenizer keeps the text: its unknown tokens, and a sample that is decoded again."""

import numpy as np

from scaling_testbed.data.manifest import SPLITS

SAMPLE_BYTES = 1 << 16  # of a document
LOST_SHARE = 0.01  # of tokens that are unknown, or of text that does not come back; above it text counts as lost


class TextCheck:
    """Looks whether a tokenizer keeps text: unknown tokens in all documents, and decode(encode(x)) == x on a sample.

    There is one for each split of a chunk. The sample is its first 8 documents, and of the others one in 256, chosen by
    the document's hash. Of a long document the first SAMPLE_BYTES are taken. An encoder without `decode` is not
    sampled.
    """

    def __init__(self, encoder):
        self._encode_batch, self._decode = encoder.encode_batch, getattr(encoder, "decode", None)
        self._unknown = getattr(encoder, "unknown", None)
        self._seen = 0
        self.n_tokens = self.n_unknown = 0
        self.documents = self.changed = self.n_bytes = self.lost_bytes = 0

    def look_at(self, document: bytes, ids: np.ndarray, found: int) -> None:
        """Add a document, its token ids and its hash."""
        self.n_tokens += len(ids)
        if self._unknown is not None:
            self.n_unknown += int(np.count_nonzero(ids == self._unknown[1]))
        self._seen += 1
        if self._decode is None or not (self._seen <= 8 or found % 256 == 0):
            return
        if len(document) > SAMPLE_BYTES:
            document = document[:SAMPLE_BYTES].decode("utf-8", "ignore").encode()  # it ends between two characters
            ids = self._encode_batch([document])[0]
        lost = lost_bytes(document.decode("utf-8", "replace"), self._decode(ids))
        self.documents, self.n_bytes = self.documents + 1, self.n_bytes + len(document)
        self.changed, self.lost_bytes = self.changed + (lost > 0), self.lost_bytes + lost

    def as_dict(self) -> dict:
        """The counts as plain JSON."""
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}


def lost_bytes(text: str, back: str) -> int:
    """The bytes of a text's lines that do not come back. All bytes if the number of lines is another one.

    One blank at the start, which many tokenizers add or drop, is passed over. Other blanks at both ends are compared by
    their number only.
    """
    if text.removeprefix(" ") == back.removeprefix(" "):
        return 0
    n_bytes = len(text.encode())
    if text.strip() == back.strip():
        return min(n_bytes, max(1, abs(n_bytes - len(back.encode()))))
    lines, lines_back = text.split("\n"), back.split("\n")
    if len(lines) != len(lines_back):
        return n_bytes
    return min(n_bytes, sum(len(a.encode()) + 1 for a, b in zip(lines, lines_back, strict=True) if a != b))


def checked_text(encoder, records: list[dict]) -> dict:
    """What the checks of all tasks found in each split, and how text is lost: `lost`, null if it is not.

    unknown_share: of all tokens. lost_share: of the sampled bytes; null if there is no sample, because the encoder has
    no `decode`.
    """
    unknown = getattr(encoder, "unknown", None)
    found: dict[str, dict] = {}
    n_unknown, n_lost = [], []  # shares that are too large, as text
    for split in SPLITS:
        total = {key: sum(record[split][key] for record in records) for key in records[0][split]}
        unknown_share = total["n_unknown"] / max(1, total["n_tokens"])
        lost_share = total["lost_bytes"] / max(1, total["n_bytes"]) if total["documents"] else None
        found[split] = {
            "unknown_share": unknown_share,
            "sampled_documents": total["documents"],
            "sampled_bytes": total["n_bytes"],
            "changed_documents": total["changed"],
            "lost_share": lost_share,
        }
        if unknown_share > LOST_SHARE:
            n_unknown.append(f"{percent(unknown_share)} of the {split}")
        if lost_share is not None and lost_share > LOST_SHARE:
            n_lost.append(f"{percent(lost_share)} of the {split}")
    reasons = []
    if unknown is not None and n_unknown:
        reasons.append(f"{' and '.join(n_unknown)} tokens are unknown text ({unknown[0]})")
    if n_lost:
        reasons.append(f"{' and '.join(n_lost)} text does not come back from its tokens")
    return {
        "unknown_token": None if unknown is None else unknown[0],
        "splits": found,
        "lost": ", ".join(reasons) or None,
    }


def percent(share: float) -> str:
    """A share in percent, with two digits that count."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"
