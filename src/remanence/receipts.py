"""Receipts of served requests: what was asked, what was done, which weights came out, what the audit found; signed, and checked again later.

A receipt is plain JSON, made from the ledger alone. It names the forgotten rows by a hash, never by their text: whoever holds the rows can check that they
are the ones, and no one else learns them. (Rows that can be guessed can be checked by guessing: keep receipts as private as the request.)

| key | what |
|---|---|
| run, event, request | which request of which run |
| asked | the kind, and of each set of the request the number of rows and their hash (`stream.fingerprint`) |
| method, settings, steps, seconds, at | what served it |
| weights | SHA-256 of the model before and after (`models.load.weights_hash`) |
| scores | every number of every probe on the request's sets, before and after |
| audit | verdict, reasons and findings; `null` where no audit ran |
| signature | Ed25519 over the canonical JSON of all other keys, with the public key; absent without a local key |

The key is an Ed25519 private key in PEM at `$REMANENCE_KEY`, by default `~/.config/remanence/receipts.pem`; `remanence receipt key` makes one.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remanence.errors import Mistake
from remanence.ledger import END, Ledger
from remanence.storage import write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FORMAT = 1


def receipts_of(ledger: Ledger, run: str | None = None) -> list[dict[str, Any]]:
    """Return a receipt for every served request of a ledger, in order, unsigned.

    Args:
        ledger: to read.
        run: of this run alone.
    """
    found = []
    for row in ledger.rows("runs", run):
        for event in ledger.read("SELECT * FROM events WHERE run = ? AND verb = 'forget' ORDER BY event", row["run"]):
            settings = json.loads(event["settings"])
            if settings.get("method") != {}:  # else nothing was done: an oracle's life
                found.append(_receipt(ledger, row, event, settings))
    return found


def _receipt(ledger: Ledger, run: Mapping[str, Any], event: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    place = (run["run"], event["event"])
    notes = {
        note["name"]: json.loads(note["content"])
        for note in ledger.read("SELECT name, content FROM notes WHERE run = ? AND event = ?", *place)
    }
    scores: dict[str, dict[str, dict[str, float | None]]] = {}
    for moment, number in (("before", event["event"] - 1), ("after", event["event"])):
        question = "SELECT subject, metric, value FROM scores WHERE run = ? AND event = ? AND step = ? AND substr(subject, 1, ?) = ?"
        prefix = f"{event['name']}/"
        for score in ledger.read(question, run["run"], number, END, len(prefix), prefix):
            scores.setdefault(score["subject"].removeprefix(prefix), {}).setdefault(score["metric"], {})[moment] = _finite(score["value"])
    return {
        "format": FORMAT,
        "kind": "forgetting",
        "run": run["run"],
        "event": event["event"],
        "request": event["name"],
        "asked": notes.get("asked"),
        "method": event["method"],
        "settings": settings,
        "steps": event["steps"],
        "weights": {"before": event["weights_before"], "after": event["weights_after"]},
        "scores": scores,
        "audit": notes.get("audit"),
        "versions": json.loads(run["versions"]),
        "seconds": event["seconds"],
        "at": event["at"],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None  # JSON has no infinity


def write_receipts(ledger: Ledger, folder: Path, run: str | None = None) -> list[Path]:
    """Write the receipts of a ledger as `RUN-EVENT-REQUEST.json`, signed where there is a key; return the paths."""
    key, paths = local_key(), []
    for receipt in receipts_of(ledger, run):
        name = re.sub(r"[^\w.-]+", "-", f"{receipt['run'].partition('/')[2]}-{receipt['event']:03d}-{receipt['request']}")
        paths.append(folder / f"{name}.json")
        write_receipt(receipt, paths[-1], key)
    return paths


def write_receipt(receipt: Mapping[str, Any], path: Path, key: Ed25519PrivateKey | None = None) -> None:
    """Write one receipt, signed if a key is given."""
    write_text(path, json.dumps(signed(receipt, key) if key else dict(receipt), indent=1, ensure_ascii=False) + "\n")


def canonical(receipt: Mapping[str, Any]) -> bytes:
    """Return the bytes that a signature covers: everything but the signature, keys sorted, no spaces, UTF-8."""
    rest = {name: value for name, value in receipt.items() if name != "signature"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# Keys and signatures.


def key_path() -> Path:
    """Return where the local key is looked for."""
    base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get("REMANENCE_KEY") or base / "remanence" / "receipts.pem")


def make_key(path: Path | None = None) -> Path:
    """Make an Ed25519 key that only its owner can read; return its path.

    Raises:
        Mistake: there is one already, the folder cannot be written, or `cryptography` is not installed.
    """
    crypto = _cryptography()
    path = path or key_path()
    if path.exists():
        raise Mistake(path, "is there already", "use it, or move it away first: receipts that it signed are checked with it")
    pem = crypto.Ed25519PrivateKey.generate().private_bytes(
        crypto.serialization.Encoding.PEM, crypto.serialization.PrivateFormat.PKCS8, crypto.serialization.NoEncryption()
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
    except OSError as error:
        raise Mistake(path, f"cannot be written ({error.strerror})", "name another place in REMANENCE_KEY") from error
    return path


def local_key() -> Ed25519PrivateKey | None:
    """Return the local key, `None` where there is none.

    Raises:
        Mistake: the file is no Ed25519 key, or `cryptography` is not installed.
    """
    path = key_path()
    if not path.is_file():
        return None
    crypto = _cryptography()
    try:
        key = crypto.serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError, OSError) as error:
        raise Mistake(
            path, f"is no usable key ({error})", "make one with `remanence receipt key`, or name another in REMANENCE_KEY"
        ) from error
    if not isinstance(key, crypto.Ed25519PrivateKey):
        raise Mistake(path, f"is no Ed25519 key but {type(key).__name__}", "make one with `remanence receipt key`")
    return key


def public_key(key: Ed25519PrivateKey) -> str:
    """Return a key's public half, base64 of its 32 bytes."""
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def signed(receipt: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the receipt with its signature."""
    value = base64.b64encode(key.sign(canonical(receipt))).decode()
    return dict(receipt) | {"signature": {"algorithm": "ed25519", "public_key": public_key(key), "value": value}}


def _cryptography() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise Mistake(
            "receipt", f"signing needs a package that is not installed ({error.name})", "pip install 'remanence[sign]'"
        ) from error
    from types import SimpleNamespace

    names = {"Ed25519PrivateKey": ed25519.Ed25519PrivateKey, "Ed25519PublicKey": ed25519.Ed25519PublicKey}
    return SimpleNamespace(serialization=serialization, **names)


# Checking.


def read_receipt(path: Path) -> dict[str, Any]:
    """Read a receipt.

    Raises:
        Mistake: the file is missing, is no JSON, or no receipt of this format.
    """
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Mistake(path, "does not exist", "name a receipt that `remanence run` or `remanence forget` wrote") from None
    except (OSError, ValueError) as error:
        raise Mistake(
            path, f"cannot be read as JSON ({error})", "name a receipt that `remanence run` or `remanence forget` wrote"
        ) from error
    if not isinstance(receipt, dict) or receipt.get("kind") != "forgetting" or receipt.get("format") != FORMAT:
        raise Mistake(path, "is no receipt of a request", "name a receipt that `remanence run` or `remanence forget` wrote")
    asked = receipt.get("asked")
    forget = asked.get("forget") if isinstance(asked, dict) else {}
    held = {"run": (receipt.get("run"), str), "event": (receipt.get("event"), int), "weights": (receipt.get("weights"), dict)}
    held |= {"asked": (asked if asked is not None else {}, dict), "asked.forget": (forget if forget is not None else {}, dict)}
    wrong = next((name for name, (value, kind) in held.items() if not isinstance(value, kind)), None)
    if wrong is not None:
        raise Mistake(
            path, f"'{wrong}' is not what a receipt holds there", "name a receipt that `remanence run` or `remanence forget` wrote"
        )
    return receipt


def check_receipt(
    receipt: Mapping[str, Any],
    *,
    trusted: str | None = None,
    rows_sha256: str | None = None,
    weights: str | None = None,
    ledger: Ledger | None = None,
) -> list[tuple[str, bool, str]]:
    """Return what was checked: (what, whether it holds, the words for it).

    Args:
        receipt: to check.
        trusted: the public key (base64) that must have signed it; without it any key that fits its signature counts, and the words say so.
        rows_sha256: fingerprint of the rows that are said to be forgotten.
        weights: hash of the model that is said to have come out.
        ledger: of the run; its own receipt must say the same.
    """
    found = [_signature(receipt, trusted)]
    if rows_sha256 is not None:
        asked = (receipt.get("asked") or {}).get("forget", {}).get("sha256")
        same = asked == rows_sha256
        found.append(
            (
                "rows",
                same,
                "the rows are those that were asked for" if same else f"the rows have the hash {rows_sha256}, the receipt says {asked}",
            )
        )
    if weights is not None:
        after = (receipt.get("weights") or {}).get("after")
        same = after == weights
        found.append(
            ("model", same, "the model is the one that came out" if same else f"the model has the hash {weights}, the receipt says {after}")
        )
    if ledger is not None:
        own = next((one for one in receipts_of(ledger, receipt.get("run")) if one["event"] == receipt.get("event")), None)
        same = own is not None and canonical(own) == canonical(receipt)
        told = (
            "the ledger says the same"
            if same
            else "the ledger has no such request"
            if own is None
            else f"the ledger differs in '{_differing(own, receipt)}'"
        )
        found.append(("ledger", same, told))
    return found


def _signature(receipt: Mapping[str, Any], trusted: str | None) -> tuple[str, bool, str]:
    seal = receipt.get("signature")
    if not isinstance(seal, dict):
        return "signature", trusted is None, "the receipt is not signed"
    crypto = _cryptography()
    from cryptography.exceptions import InvalidSignature

    try:
        held = crypto.Ed25519PublicKey.from_public_bytes(base64.b64decode(seal["public_key"]))
        held.verify(base64.b64decode(seal["value"]), canonical(receipt))
    except (InvalidSignature, ValueError, KeyError, TypeError):
        return "signature", False, "the signature does not fit: the receipt was changed after it was signed"
    if trusted is not None and trusted != seal["public_key"]:
        return "signature", False, f"the receipt was signed by another key ({seal['public_key']})"
    return (
        "signature",
        True,
        "the signature fits"
        + ("" if trusted else f" the key that the receipt names ({seal['public_key']}); say whose it must be with --key"),
    )


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return next((key for key in {**one, **other} if key != "signature" and one.get(key) != other.get(key)), "nothing")
