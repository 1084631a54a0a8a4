"""What a prepared corpus holds and what was left out of it, as lines for a terminal."""

from collections import Counter
from pathlib import Path

from scaling_testbed.data.preparing.tasks import FEW_LINES
from scaling_testbed.data.shards import SPLITS, PreparedData
from scaling_testbed.data.sources.reading import Tally
from scaling_testbed.errors import listed

MANY_COPIES = 0.1  # the share of copies in a split above which they are mentioned
MANY_LINES = 0.5  # the share of validation lines in the train split above which they are mentioned
MANY_EMPTY = 0.01  # the share of rows without text above which training says so
FEW_TOKENS = 500  # of a validation split; the mean loss of fewer is uncertain by 0.1 nats and more
SHOWN = 4  # reasons of a kind that are listed


def describe(data: PreparedData) -> str:
    """A description of a prepared corpus, one fact on each line."""
    manifest, lines = data.manifest, [("folder", str(data.folder))]
    if read := files_line(manifest):
        lines.append(("files", read))
    if foreign := _formats(manifest):
        lines.append(("formats", foreign))
    for split in SPLITS:
        record = manifest["splits"][split]
        parts = [f"{record['n_tokens']:,} tokens"]
        if "n_targets" in record:
            parts.append(f"{record['n_targets']:,} of them targets of the loss")
        parts += [f"{record[key]:,} {what}" for key, what in _COUNTS.items() if record.get(key) is not None]
        lines.append((split, ", ".join(parts)))
    for name, source in manifest.get("sources", {}).items():
        counts = [f"{source['splits'][split]['n_tokens']:,} tokens of {split}" for split in SPLITS]
        read = files_line(source)
        lines.append((f"source {name}", ", ".join([*counts, source["folder"]]) + (f"; files: {read}" if read else "")))
    lines.append(("vocabulary", f"{data.vocab_size:,} ({manifest['dtype']})"))
    for key, label in (("unigram_entropy_nats", "unigram entropy"), ("entropy_rate_nats", "entropy rate")):
        if manifest[key] is not None:
            lines.append((label, f"{manifest[key]:.4f} nats per token"))
    lines.append(("fingerprint", data.fingerprint))
    if stray := data.stray_shards():
        lines.append(("not read", f"{listed(stray)}: not in the manifest"))
    return "\n".join([f"{label:<16} {text}" for label, text in lines] + remarks(manifest))


def _formats(manifest: dict) -> str:
    """The formats and types of a user's own token files; empty for shards of this project."""
    shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
    kinds = Counter(f"{shard['format']} of {shard['dtype']}" for shard in shards if Path(shard["file"]).is_absolute())
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))


_COUNTS = {"n_documents": "documents", "n_bytes": "bytes of text"}


def files_line(manifest: dict) -> str | None:
    """What was found, taken and left out, by reason; None for a source that counts neither files nor rows, or if an
    earlier version prepared it."""
    reading, parts = manifest.get("reading") or {}, []
    left_out = reading.get("files") or {}
    if "found" in reading:
        n_later = reading.get("not_reached") or 0
        n_taken = reading["found"] - sum(entry["count"] for entry in left_out.values()) - n_later
        parts.append(f"{reading['found']:,} found, {n_taken:,} taken")
        if n_later:
            parts.append(f"{n_later:,} not reached, because the source is limited")
    if left_out:
        parts.append(f"left out {counted(left_out)}")
    if bad := reading.get("bad_rows"):
        parts.append(f"of {reading['rows']:,} rows left out {counted(bad)}")
    if reading.get("empty_rows"):
        parts.append(f"{reading['empty_rows']:,} of {reading['rows']:,} rows have no text")
    if reading.get("chats"):
        parts.append(f"{reading['chats']:,} lists of messages became text: {reading['chat_format']}")
    if noted := reading.get("noted"):
        parts.append(f"taken with {counted(noted)}")
    return "; ".join(parts) or None


def left_out_line(manifest: dict) -> str | None:
    """`files_line` if something other than empty files was left out, if many rows have no text, or if something was
    noted, else None."""
    reading = manifest.get("reading") or {}
    left_out = {**(reading.get("files") or {}), **(reading.get("bad_rows") or {}), **(reading.get("noted") or {})}
    many_empty = (reading.get("empty_rows") or 0) > MANY_EMPTY * (reading.get("rows") or 0)
    return files_line(manifest) if left_out.keys() - {"empty"} or many_empty else None


def left_out_since(manifest: dict, now: Tally) -> str | None:
    """The files that are left out now, and were not there when the corpus was prepared, as a line."""
    then = (manifest.get("reading") or {}).get("files") or {}
    added = {
        reason: {**entry, "count": more} for reason, entry in now.files.items()
        if (more := entry["count"] - then.get(reason, {}).get("count", 0)) > 0
    }  # fmt: skip
    return f"left out too, since then: {counted(added)}" if added else None


def counted(entries: dict[str, dict]) -> str:
    """Counts of reasons as text, the largest first, each with the first place."""
    ordered = sorted(entries.items(), key=lambda item: -item[1]["count"])
    shown = [f"{entry['count']:,} {reason} ({entry['first'][0]})" for reason, entry in ordered[:SHOWN]]
    if rest := sum(entry["count"] for _, entry in ordered[SHOWN:]):
        shown.append(f"{rest:,} for other reasons")
    return ", ".join(shown)


def remarks(manifest: dict) -> list[str]:
    """What makes numbers of this corpus doubtful, one line for each; empty if nothing is known."""
    lines, documents = [], manifest.get("documents") or {}
    if (n_tokens := manifest["splits"]["validation"]["n_tokens"]) < FEW_TOKENS:
        lines.append(f"warning: the validation split has {n_tokens:,} tokens, and a loss on so few is uncertain")
    n_documents = {split: manifest["splits"][split]["n_documents"] for split in SPLITS}
    if shared := documents.get("validation_in_train"):
        share = shared / n_documents["validation"]
        lines.append(
            f"warning: {shared:,} of {n_documents['validation']:,} validation documents ({share:.1%}) are training "
            "documents too"
        )
    n_lines, n_shared = (documents.get(f"sampled_validation_lines{which}") or 0 for which in ("", "_in_train"))
    if n_shared > MANY_LINES * n_lines and n_lines >= FEW_LINES:
        lines.append(
            f"warning: {n_shared / n_lines:.1%} of the validation lines are training lines too (of a sample of "
            f"{n_lines:,} lines)"
        )
    n_windows, n_shared = (documents.get(f"sampled_validation_windows{which}") or 0 for which in ("", "_in_train"))
    if n_shared > MANY_LINES * n_windows and n_windows >= FEW_LINES:
        lines.append(
            f"warning: {n_shared / n_windows:.1%} of the validation tokens are training tokens too (of a sample of "
            f"{n_windows:,} places)"
        )
    for split, distinct in (documents.get("distinct") or {}).items():
        copies = n_documents[split] - distinct
        if copies > MANY_COPIES * n_documents[split]:
            lines.append(
                f"warning: {copies:,} of {n_documents[split]:,} documents in {split} are copies of others there"
            )
    if lost := (manifest.get("text_check") or {}).get("lost"):
        lines.append(f"warning: the tokenizer loses text, so bits per byte is not reported: {lost}")
    for name, source in manifest.get("sources", {}).items():
        lines += [line.replace("warning: ", f"warning: {name}: ", 1) for line in remarks(source)]
    return lines
