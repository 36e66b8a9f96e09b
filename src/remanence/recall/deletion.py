"""Receipts of deletion: what was asked, what went, what a scan of every file found afterwards; signed, and checked again later.

A receipt holds no text, no name and no vector. What was erased stands in it as HMAC-SHA256 hashes (128 bits of them) under a key that is derived from the local
receipts key and the receipt's number: whoever holds that key can say whether a text was among the erased ones; nobody else can, not even by guessing, and no two
receipts can be compared. Without a local key there are no hashes and no signature.

| key | what |
|---|---|
| id, store, at, kind | number of the receipt, of the store, seconds since the epoch, `deletion` or `edit` |
| asked | the conditions of the selection: numbers, times and roles plain, names hashed; `reason` as the user gave it |
| erased | counts: messages, chunks, vectors, facts, gists that were removed and made anew, spaces dropped, keys destroyed |
| ids | of the erased messages, as [first, last] |
| texts | sorted hashes of the erased texts, up to `LISTED` |
| echoes | messages of the same spaces that stay and repeat a phrase of an erased text (`residue.ECHO` characters) |
| scan | files, bytes, byte strings looked for, texts looked for, texts too short for it, found (0 is what one wants); `null`: not scanned, as on a database server, whose files are out of reach |
| signature | as of `remanence.receipts` |

Everything but `scan` and the signature is in the store's audit log too, written in the transaction that erased: a receipt that a kill swallowed is given again by
`receipts_of`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from remanence.errors import Mistake
from remanence.recall.items import Selection
from remanence.recall.protocols import Store
from remanence.recall.residue import scan_store
from remanence.receipts import canonical, check_receipt, local_key, signed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from remanence.recall.service import Recall

FORMAT = 1
ERASED, SCRUBBED = "erased", "scrubbed"  # actions in the audit log
LISTED = 10_000  # hashes of texts in one receipt
NAMES = ("space", "conversation", "person")
Checked = list[tuple[str, bool, str]]


# Making.


def hasher(number: str, key: Ed25519PrivateKey | None) -> Hasher | None:
    """Return what hashes texts for one receipt, `None` without a key."""
    return None if key is None else Hasher(hmac.digest(key.private_bytes_raw(), b"remanence.recall.deletion|" + number.encode(), "sha256"))


class Hasher:
    """Hash texts under the key of one receipt."""

    def __init__(self, key: bytes):
        self._key = key

    def __call__(self, text: str) -> str:
        """Return 128 bits in hex."""
        return hmac.digest(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256)[:16].hex()


def asked(selection: Selection, reason: str, hashed: Hasher | None) -> dict[str, Any]:
    """Return a selection's conditions without its names."""
    given = {name: value for name, value in asdict(selection).items() if value is not None and name != "ids"}
    told: dict[str, Any] = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    told |= {name: hashed(told[name]) if hashed else True for name in NAMES if name in told}  # without a key only that there was one
    return told | ({"ids": ranges(selection.ids)} if selection.ids is not None else {}) | ({"reason": reason} if reason else {})


def ranges(ids: Iterable[int]) -> list[list[int]]:
    """Return sorted ids as [first, last] of each run."""
    held = np.unique(np.fromiter(ids, np.int64))
    ends = np.flatnonzero(np.diff(held) != 1)
    return np.stack([held[np.r_[0, ends + 1]], held[np.r_[ends, len(held) - 1]]], axis=1).tolist() if len(held) else []


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a receipt signed with the local key, unsigned where there is none."""
    key = local_key()
    return signed(body, key) if key else dict(body)


def receipts_of(store: Store) -> list[dict[str, Any]]:
    """Return the receipts of everything that was erased, from the audit log, signed anew; one whose scan did not happen has none."""
    scans = {entry["detail"]["id"]: entry["detail"]["scan"] for entry in store.audit_log() if entry["action"] == SCRUBBED}
    return [
        sealed({**entry["detail"], "scan": scans.get(entry["detail"]["id"])}) for entry in store.audit_log() if entry["action"] == ERASED
    ]


# Checking.


def read_deletion(path: str | Path) -> dict[str, Any]:
    """Read a receipt of deletion.

    Raises:
        Mistake: the file is missing, is no JSON, or no receipt of this format.
    """
    remedy = "name a receipt that `remanence recall forget` wrote"
    try:
        receipt = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Mistake(path, "does not exist", remedy) from None
    except (OSError, ValueError, RecursionError) as error:
        raise Mistake(path, f"cannot be read as JSON ({type(error).__name__})", remedy) from error
    checked_form(receipt, path)
    return receipt


def checked_form(receipt: object, place: object = "receipt") -> None:
    """Refuse what is no receipt of deletion.

    Raises:
        Mistake: a part is missing or of another kind.
    """
    remedy = "name a receipt that `remanence recall forget` wrote"
    if not isinstance(receipt, dict) or receipt.get("kind") not in ("deletion", "edit") or receipt.get("format") != FORMAT:
        raise Mistake(place, "is no receipt of deletion", remedy)
    kinds: dict[str, Any] = {"id": str, "store": str, "asked": dict, "erased": dict, "ids": list, "texts": list | None, "scan": dict | None}
    wrong = next((name for name, kind in kinds.items() if not isinstance(receipt.get(name), kind)), None)
    if wrong is None and not all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in receipt["ids"]
    ):
        wrong = "ids"
    if wrong is None and not all(abs(n) < 2**62 for pair in receipt["ids"] for n in pair):
        wrong = "ids"
    if wrong is None and not all(isinstance(text, str) for text in receipt["texts"] or ()):
        wrong = "texts"
    if wrong is None:
        try:
            canonical(receipt)
        except (ValueError, TypeError, RecursionError):
            wrong = "text"  # half a surrogate pair, a loop
    if wrong is not None:
        raise Mistake(place, f"'{wrong}' is not what a receipt holds there", remedy)


def check_deletion(
    receipt: Mapping[str, Any], of: Recall | Store | None = None, *, texts: Sequence[str] = (), trusted: str | None = None
) -> Checked:
    """Return what was checked: (what, whether it holds, the words for it).

    Args:
        receipt: to check.
        of: the memory, or its store, that it is said to come from; without it the signature and the receipt's own scan are all that can be checked.
        texts: that are said to be erased: every file of the store is scanned for them now.
        trusted: the public key (base64) that must have signed it; without it any key that fits its signature counts, and the words say so.

    Raises:
        Mistake: this is no receipt of deletion.
    """
    checked_form(receipt)
    found = [*check_receipt(receipt, trusted=trusted), _own_scan(receipt)]
    if texts:
        found += _among(receipt, texts)
    if of is None:
        return found
    from remanence.recall.service import Recall

    store = of.store if isinstance(of, Recall) else of
    same = receipt["store"] == store.id
    found.append(("store", same, "the receipt is of this store" if same else "the receipt is of another store"))
    if same:
        found += [_gone(receipt, store), _logged(receipt, store), _chain(store)]
    if texts:
        found.append(_kept(store, texts))
        if not store.files():
            return [*found, ("residue", False, "the files of a server cannot be read from here: nothing was scanned")]
        seen = scan_store(store, texts)
        words = (
            f"{seen.files} files ({seen.bytes} bytes) hold none of the {len(texts) - seen.short} texts" if seen.clean else _told(seen.found)
        )
        short = f"; {seen.short} of them are too short to be told from chance" if seen.short else ""
        found.append(("residue", seen.clean, words + short))
    return found


def _kept(store: Store, texts: Sequence[str]) -> tuple[str, bool, str]:
    """Say whether a message or fact that stays holds one of the texts: the scan of the files leaves out what is kept."""
    said = sorted({message.id for text in texts if text for message in store.messages(Selection(space=None), contains=text)})
    facts = [fact.id for space in store.spaces() for fact in store.facts(space) if any(text and text in fact.text for text in texts)]
    if not said and not facts:
        return "kept", True, "no message or fact that stays holds one of the texts"
    kinds = (("messages", said), ("facts", facts))
    there = " and ".join(f"{kind} {', '.join(map(str, ids[:5]))}{' ...' if len(ids) > 5 else ''}" for kind, ids in kinds if ids)
    return "kept", False, f"{there} hold one of the texts: they were not erased, or it was said again"


def _told(found: Sequence[Any]) -> str:
    places = ", ".join(sorted({f"{Path(one.path).name} at byte {one.offset} ({one.kind}, {one.form})" for one in found[:3]}))
    return f"{len(found)} traces of the texts are there: {places}"


def _own_scan(receipt: Mapping[str, Any]) -> tuple[str, bool, str]:
    seen = receipt["scan"]
    if seen is None:
        return "scan", False, "the files were not scanned after this erasure"
    return "scan", seen.get("found") == 0, f"the scan after the erasure found {seen.get('found')} traces in {seen.get('files')} files"


def _among(receipt: Mapping[str, Any], texts: Sequence[str]) -> Checked:
    """Say whether the texts are those that were erased, where this can be known."""
    hashed = hasher(receipt["id"], local_key())
    if hashed is None or not receipt["texts"]:
        return []
    held = set(receipt["texts"])
    count = sum(hashed(text) in held for text in texts)
    return [("texts", count == len(texts), f"{count} of {len(texts)} texts are among those erased, by their hashes")]


def _gone(receipt: Mapping[str, Any], store: Store) -> tuple[str, bool, str]:
    if receipt["kind"] == "edit":
        return "ids", True, "the message was edited: its number stays"
    there = 0
    for space in store.spaces():
        held = store.ids(Selection(space=space))
        there += sum(int(np.searchsorted(held, last, "right") - np.searchsorted(held, first, "left")) for first, last in receipt["ids"])
    return "ids", there == 0, "all messages are gone" if there == 0 else f"{there} of the messages are there"


def _logged(receipt: Mapping[str, Any], store: Store) -> tuple[str, bool, str]:
    own = next((e["detail"] for e in store.audit_log() if e["action"] == ERASED and e["detail"].get("id") == receipt["id"]), None)
    if own is None:
        return "log", False, "the store's log has no such erasure"
    body = {name: value for name, value in receipt.items() if name != "scan"}
    same = canonical(own) == canonical(body)
    return "log", same, "the store's log says the same" if same else "the store's log says something else"


def _chain(store: Store) -> tuple[str, bool, str]:
    entries = store.audit_log()
    before = [""] + [entry["hash"] for entry in entries[:-1]]
    whole = all(entry["previous"] == hash and entry["hash"] == _link(entry) for entry, hash in zip(entries, before, strict=True))
    return "chain", whole, f"the log's {len(entries)} entries follow one another" if whole else "the log was changed after it was written"


def _link(entry: Mapping[str, Any]) -> str:
    told = json.dumps(entry["detail"], sort_keys=True, ensure_ascii=False)
    row = [entry["id"], entry["at"], entry["action"], told, entry["previous"]]
    return hashlib.sha256(json.dumps(row, ensure_ascii=False).encode()).hexdigest()
