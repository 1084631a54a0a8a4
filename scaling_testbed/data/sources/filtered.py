"""A prepared corpus with some of its training documents only, which a file of places names.

`analyze select_documents` writes such a file. The validation split is that of the corpus, so that losses can be
compared.
"""

import glob
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scaling_testbed.data.documents import documents
from scaling_testbed.data.manifest import read_manifest
from scaling_testbed.data.shard_writer import ShardWriter
from scaling_testbed.data.shards import PreparedData, data_fingerprint, open_prepared
from scaling_testbed.data.sources.source import SOURCES, Job, Source, token_record
from scaling_testbed.data.tokenizers import TOKENIZER_FILE
from scaling_testbed.errors import ConfigError, UserError, listed
from scaling_testbed.files import read_json, write_json
from scaling_testbed.keys import key

VERSION = 1  # of the file of places
WRITE_TOKENS = 1 << 20  # that are written at once


def write_kept(path: Path, corpus: PreparedData, kept: list[int], about: Mapping[str, Any]) -> None:
    """Write the file of the training documents of `corpus` that are kept. about: how they were chosen, as JSON."""
    content = {"data_fingerprint": corpus.fingerprint, "documents": kept, **about}
    write_json(path, {"schema_version": VERSION, **content, "sha256": _sha256(content)})


def read_kept(path: Path) -> dict[str, Any]:
    """Read what `write_kept` wrote. Raises UserError, which names the file, if it is missing, damaged or of another
    version."""
    advice = "write it again by `analyze select_documents`"
    found: dict[str, Any] = read_json(path, advice=advice)
    if found.get("schema_version") != VERSION:
        raise UserError(f"{path} has schema_version {str(found.get('schema_version'))[:20]}, not {VERSION}; {advice}")
    content = {name: value for name, value in found.items() if name not in ("schema_version", "sha256")}
    kept = found.get("documents")
    if found.get("sha256") != _sha256(content) or not isinstance(kept, list):
        raise UserError(f"{path} differs from the hash in it; it was changed or damaged; {advice}")
    return found


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@SOURCES.register("filtered")
@dataclass(frozen=True, kw_only=True)
class FilteredConfig(Source):
    """A prepared corpus with some of its training documents."""

    name: str = "filtered"
    corpus: str | None = key(
        None, "The folder of a prepared corpus, data/NAME, or a glob that only this folder matches. It must be given."
    )
    documents: str | None = key(
        None, "The file of the training documents that are kept, as `analyze select_documents` writes it (.json)."
    )

    places: ClassVar[tuple[str, ...]] = ("corpus", "documents")
    where_fields: ClassVar[tuple[str, ...]] = ("corpus", "documents")

    def _paths(self) -> tuple[Path, Path]:
        for field in self.places:
            if not getattr(self, field):
                raise ConfigError(f"data.{field} must be given for data={self.kind}")
        found = sorted(glob.glob(str(self.corpus))) or [str(self.corpus)]
        if len(found) > 1:
            raise ConfigError(f"data.corpus={self.corpus} matches {listed(found)}; name one folder")
        return Path(found[0]), Path(str(self.documents))

    def identity(self) -> dict:
        """The tokens of the corpus and the file of the kept documents, whatever their folders are called."""
        folder, file = self._paths()
        kept = read_kept(file)
        there = data_fingerprint(read_manifest(folder))
        if kept["data_fingerprint"] != there:
            raise UserError(f"data.documents={file} names documents of another corpus than data.corpus={folder}")
        return {"kind": self.kind, "corpus": there, "documents": kept["sha256"]}

    def settings(self) -> dict:
        return {"kind": self.kind}

    def inputs(self) -> dict[str, list[str]]:
        return {"documents": [str(self._paths()[1].absolute())]}

    def prepare(self, job: Job) -> dict:
        folder, file = self._paths()
        corpus, kept = open_prepared(folder), read_kept(file)["documents"]
        if corpus.sources():
            raise UserError(f"data.corpus={folder} is a mixture; filter its sources, and mix the filtered ones")
        job.start(corpus.train.n_tokens + corpus.validation.n_tokens)
        counts, splits, wanted = np.zeros(corpus.vocab_size, np.int64), {}, set(kept)
        writer = ShardWriter(job.work, "train", corpus.vocab_size, masked=corpus.train.is_masked)
        n_tokens, n_documents, last = 0, 0, -1
        for last, (_, tokens, counted) in enumerate(documents(corpus, "train")):
            if last in wanted:
                writer.write(tokens, str(folder), counted)
                counts += np.bincount(tokens if counted is None else tokens[counted], minlength=len(counts))
                n_tokens, n_documents = n_tokens + len(tokens), n_documents + 1
            job.advance(len(tokens))
        if n_documents < len(wanted):
            raise UserError(f"{file} names documents that {folder} does not have: it has {last + 1:,}")
        splits["train"] = writer.record(**token_record(n_tokens, n_documents))
        splits["validation"] = self._copied(corpus, job)
        if (tokenizer := folder / TOKENIZER_FILE).exists():
            shutil.copyfile(tokenizer, job.work / TOKENIZER_FILE)
        of_corpus = ("tokenizer", "tokenizer_fingerprint", "eos_id", "text_check")
        return self.manifest(splits, counts, **{name: corpus.manifest.get(name) for name in of_corpus})

    def _copied(self, corpus: PreparedData, job: Job) -> dict:
        """The validation split of the corpus, in a shard of its own."""
        stream, record = corpus.validation, corpus.manifest["splits"]["validation"]
        writer = ShardWriter(job.work, "validation", corpus.vocab_size, masked=stream.is_masked)
        for start in range(0, stream.n_tokens, WRITE_TOKENS):
            tokens = stream.read(start, min(WRITE_TOKENS, stream.n_tokens - start))
            counted = stream.counted(start, len(tokens)) if stream.is_masked else None
            writer.write(np.asarray(tokens), stream.label, counted)
            job.advance(len(tokens))
        return {**record, "shards": writer.close()}
