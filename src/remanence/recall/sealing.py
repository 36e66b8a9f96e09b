"""A key per space, kept outside the store: without it the space is noise, in the store and in every backup of it.

The idea is crypto-shredding: what must be forgotten for good is encrypted from the start (AES-256-GCM, a fresh nonce per record), and destroying 32 bytes
destroys all copies. Keys lie in `$REMANENCE_KEYS/STORE/KEY`, by default `~/.local/share/remanence/keys`; back them up apart from the store, or not at all.
Cost: 28 bytes and about 2 microseconds per record.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from remanence.errors import Mistake


def keys_folder(store: str) -> Path:
    """Return where the keys of a store are kept."""
    base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "remanence" / "keys"
    return Path(os.environ.get("REMANENCE_KEYS") or base) / store


class Sealer:
    """Encrypt and look up the records of one space.

    Args:
        key: 32 bytes; two keys are derived from it, one to encrypt, one for the hashes that rows are found by.
    """

    def __init__(self, key: bytes):
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise Mistake(
                "recall", f"encryption needs a package that is not installed ({error.name})", "pip install 'remanence[sign]'"
            ) from error
        self._cipher = AESGCM(hmac.digest(key, b"remanence.recall.seal", "sha256"))
        self._look = hmac.digest(key, b"remanence.recall.look", "sha256")

    def seal(self, kind: str, content: bytes) -> bytes:
        """Return nonce and ciphertext; `kind` (of the record) must be the same when it is opened."""
        nonce = os.urandom(12)
        return nonce + self._cipher.encrypt(nonce, content, kind.encode())

    def open(self, kind: str, sealed: bytes) -> bytes:
        """Return the content.

        Raises:
            Mistake: the record was changed, or sealed with another key.
        """
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(sealed[:12], sealed[12:], kind.encode())
        except (InvalidTag, ValueError) as error:
            raise Mistake("recall", f"a sealed record ({kind}) does not fit its key", "restore the store and its key") from error

    def look(self, kind: str, value: str) -> str:
        """Return the keyed hash that a value is found by."""
        return hmac.digest(self._look, f"{kind}:{value}".encode(), hashlib.sha256).hex()


def make_key(folder: Path) -> str:
    """Make a key that only its owner can read, synced before it is used; return its name."""
    name = secrets.token_hex(16)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        _sync(folder)
    except OSError as error:
        raise Mistake(folder, f"the key cannot be written ({error.strerror})", "name a folder for keys in REMANENCE_KEYS") from error
    return name


def read_key(folder: Path, name: str) -> bytes | None:
    """Return a key, `None` where it is gone.

    Raises:
        Mistake: it is there and cannot be read.
    """
    try:
        key = (folder / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Mistake(folder / name, f"the key cannot be read ({error.strerror})", "check its permissions") from error
    if len(key) != 32:
        raise Mistake(folder / name, f"is no key ({len(key)} bytes, expected 32)", "restore it from where keys are kept")
    return key


def destroy_key(folder: Path, name: str) -> None:
    """Overwrite a key and remove it; one that is gone is left gone."""
    path = folder / name
    try:
        with open(path, "r+b") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
        _sync(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Mistake(path, f"the key cannot be destroyed ({error.strerror})", "remove the file by hand") from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
