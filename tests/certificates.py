"""Makes chains of certificates and keys that C2PA accepts, and faulty ones.

`python -m tests.certificates FOLDER` writes a chain and its key, to try signatures.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, text),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "batchgen's tests"),
        ]
    )


def _certificate(name: str, key: Any, issuer: Any, days: tuple[int, int], **uses: bool) -> Any:
    """A certificate for ``key``, issued by the key ``issuer``; ``days`` from now it is valid."""
    now = datetime.datetime.now(datetime.UTC)
    is_issuer = key is issuer
    usage = {
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name("issuer"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * DAY)
        .not_valid_after(now + days[1] * DAY)
        .add_extension(x509.BasicConstraints(is_issuer, None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False
        )
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_issuer,
                key_cert_sign=is_issuer,
                crl_sign=is_issuer,
                **usage,
            ),
            True,
        )
    )
    if uses.get("signs", True) and not is_issuer:
        allowed = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(allowed, False)
    return builder.sign(issuer, hashes.SHA256())


def write_chain(
    folder: Path, days: tuple[int, int] = (-1, 30), signs: bool = True, password: bytes = b""
) -> tuple[str, str]:
    """Write ``chain.pem`` and ``key.pem``; returns their paths.

    Args:
        days: from now, between which the signer's certificate is valid.
        signs: with an extended key usage, which C2PA needs.
        password: of the key.
    """
    issuer, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain = [
        _certificate("signer", key, issuer, days, signs=signs),
        _certificate("issuer", issuer, issuer, (-400, 400)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(b"".join(one.public_bytes(pem) for one in chain))
    hidden: Any = serialization.NoEncryption()
    if password:
        hidden = serialization.BestAvailableEncryption(password)
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, form, hidden))
    return str(folder / "chain.pem"), str(folder / "key.pem")


if __name__ == "__main__":
    print(*write_chain(Path(sys.argv[1])))
