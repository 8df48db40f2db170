"""Signs image files with C2PA: a manifest that says that a generative model made the image.

The library is c2pa-python, of the Content Authenticity Initiative; the format is the C2PA technical
specification. Signing changes the bytes of a file and not its pixels.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batchgen import __version__
from batchgen.errors import InputError
from batchgen.images.files import ImageFormat, encode_image
from batchgen.images.provenance import SOURCE_TYPE
from batchgen.storage import storage_errors

UNSIGNED = "unsigned_sha256"  # column: SHA-256 of the image before it was signed
_NEEDS = "signing needs c2pa-python: `pip install 'batchgen[sign]'`"
_MANIFEST = {
    "claim_generator_info": [{"name": "batchgen", "version": __version__}],
    "assertions": [
        {
            "label": "c2pa.actions",
            "data": {
                "actions": [
                    {
                        "action": "c2pa.created",
                        "digitalSourceType": SOURCE_TYPE,
                        "softwareAgent": {"name": "batchgen", "version": __version__},
                    }
                ]
            },
        }
    ],
}
_PLAIN = {"builder": {"thumbnail": {"enabled": False}}}  # else an image grows by 190 kB
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True)
class ImageSigner:
    """Signs image files of one format. It is called from several threads.

    Attributes:
        mime: of the images.
        certificate_sha256: of the signer's certificate.
    """

    mime: str
    certificate_sha256: str
    _signer: Any = field(repr=False)
    _context: Any = field(repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __call__(self, image: bytes) -> bytes:
        """The signed file."""
        import c2pa

        signed = io.BytesIO()
        with self._lock:
            builder = c2pa.Builder(json.dumps(_MANIFEST), context=self._context)
            builder.sign(self._signer, self.mime, io.BytesIO(image), signed)
        return signed.getvalue()

    def table(self, table: pa.Table) -> pa.Table:
        """A shard's table with signed images: their new SHA-256, and the one from before."""
        images = table.column("image").to_pylist()
        signed = [{**one, "bytes": self(one["bytes"])} for one in images]
        digests = [hashlib.sha256(one["bytes"]).hexdigest() for one in signed]
        before = table.column("sha256")
        for name, values in (("image", signed), ("sha256", digests)):
            place = table.schema.get_field_index(name)
            kind = table.schema.field(name)
            table = table.set_column(place, kind, pa.array(values, kind.type))
        return table.append_column(pa.field(UNSIGNED, pa.string()), before)


def open_signer(certificate: str, key: str, image_format: ImageFormat) -> ImageSigner:
    """Read a certificate and its key, and sign one small image as a trial.

    Args:
        certificate: file with the certificate, and those of its issuers after it, as PEM.
        key: file with the private key of the certificate, as PEM without a password.
        image_format: of the images.

    Raises:
        InputError: a file is missing or damaged, the key is that of another certificate, a
            certificate is not valid now, or C2PA does not accept it; messages never have the key.
    """
    try:
        import c2pa
    except ModuleNotFoundError as error:
        raise InputError(_NEEDS) from error
    mime = f"image/{image_format}"
    if mime not in c2pa.Builder.get_supported_mime_types():
        raise InputError(f"--sign: c2pa-python cannot sign {mime}; export images of another format")
    chain, secret = _read("--sign", certificate), _read("--key", key)
    certificates = _certificates(certificate, chain)
    algorithm = _check_key(certificate, certificates[0], key, secret)
    _check_dates(certificate, certificates)
    try:
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, secret, None))
        context = c2pa.Context(c2pa.Settings.from_dict(_PLAIN))
        made = ImageSigner(mime, _digest(certificates[0]), signer, context)
        _try(made, image_format)
    except c2pa.C2paError as error:
        first = str(error).partition("\n")[0]
        raise InputError(
            f"--sign {certificate}: C2PA does not accept this certificate ({first}); needed: key "
            "usage digitalSignature, an extended key usage such as emailProtection, and its "
            "issuers after it in the file"
        ) from None
    return made


def _read(option: str, path: str) -> bytes:
    if not Path(path).is_file():
        raise InputError(f"{option} {path}: there is no such file")
    with storage_errors(f"read {path}"):
        return Path(path).read_bytes()


def _certificates(path: str, chain: bytes) -> Sequence[Any]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(chain)
    except ValueError:
        raise InputError(f"--sign {path}: it has no certificate in the form of PEM") from None


def _check_key(path: str, certificate: Any, key_path: str, secret: bytes) -> str:
    """The name of the signature's algorithm."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = serialization.load_pem_private_key(secret, None)
    except TypeError:
        raise InputError(f"--key {key_path}: the key has a password; give it without one") from None
    except ValueError:
        raise InputError(f"--key {key_path}: it is no private key in the form of PEM") from None
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise InputError(
            f"--key {key_path}: it is not the key of the first certificate in {path} "
            f"({certificate.subject.rfc4514_string()})"
        )
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise InputError(
        f"--key {key_path}: C2PA has no signatures by such a key; allowed: elliptic curves P-256, "
        "P-384 and P-521, RSA, Ed25519"
    )


def _check_dates(path: str, certificates: Sequence[Any]) -> None:
    now = datetime.datetime.now(datetime.UTC)
    for one in certificates:
        name = one.subject.rfc4514_string()
        if now > one.not_valid_after_utc:
            raise InputError(
                f"--sign {path}: the certificate of {name} expired on "
                f"{one.not_valid_after_utc:%Y-%m-%d}"
            )
        if now < one.not_valid_before_utc:
            raise InputError(
                f"--sign {path}: the certificate of {name} is valid only from "
                f"{one.not_valid_before_utc:%Y-%m-%d}"
            )


def _digest(certificate: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding

    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()


def _try(signer: ImageSigner, image_format: ImageFormat) -> None:
    """Sign an image and read it back.

    Raises:
        C2paError: the certificate cannot sign, or readers do not accept it.
    """
    import c2pa

    signed = signer(encode_image(np.zeros((8, 8, 3), dtype=np.uint8), image_format, 90))
    told = json.loads(c2pa.Reader(signer.mime, io.BytesIO(signed)).json())
    faults = [one["explanation"] for one in told.get("validation_status", ())]
    if told.get("validation_state") not in ("Valid", "Trusted"):
        raise c2pa.C2paError("; ".join(faults) or "a reader does not accept the signature")
