"""Secrets in URLs, taken out wherever a URL is written: user:password@, signatures, tokens and keys in a query.

A run folder, a console, W&B and a model card are read by others; the server alone needs the secret, and it comes from
the command line each time. What is left says that something was taken out, and is the same however often a URL is
signed anew.
"""

import re
from typing import Any
from urllib.parse import unquote

REDACTED = "REDACTED"
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>`|\\^{}]+")
# Names of parameters whose values are secret: these words anywhere, or these others by themselves.
SECRET = re.compile(
    r"token|secret|passw|passphrase|pwd|signature|credential|apikey|accesskey|jwt|bearer|session|auth(?!or)"
    r"|(key|sig|hmac)$|(^|[^a-z])(key|sig|pass|sas|code|ticket|hmac)([^a-z]|$)",
    re.IGNORECASE,
)
# Values that are secret by how they begin, whatever they are called.
TOKEN = re.compile(r"eyJ[\w-]{8}|hf_\w{8}|gh[pousr]_\w{8}|github_pat_|glpat-|xox[abp]-|sk-[\w-]{8}|AKIA\w{8}|ASIA\w{8}")
# What else belongs to a signature: S3, Google, OSS, COS, CloudFront, and Azure's shared access signatures.
SIGNING = re.compile(
    r"x-(amz|goog|oss|cos|obs|ms)-.*|q-.*|expires|expiry|policy|key-pair-id|awsaccesskeyid|googleaccessid|ossaccesskeyid"
    r"|algorithm|s[vsertpi]|srt|spr|sip|sk[a-z]+|s[as]oid|suoid|scid|sdd|ses|hash-algorithm",
    re.IGNORECASE,
)
CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")  # CONTAINER@ACCOUNT is no user


def url(whole: str) -> str:
    """One URL without its secrets; any other text as it is."""
    scheme, separator, rest = whole.partition("://")
    if not separator:
        return whole
    host, path, query, fragment = _parts(rest)
    user, at, host = host.rpartition("@")
    if at and not (scheme.lower() in CONTAINERS and ":" not in user):
        user = REDACTED
    query, fragment = _parameters(query), _parameters(fragment)
    return f"{scheme}{separator}{user}{at}{host}{path}{query}{fragment}"


def text(words: str) -> str:
    """Any text, with each URL in it redacted."""
    return URL.sub(lambda found: url(found[0]), words) if "://" in words else words


def tree(value: Any) -> Any:
    """Nested containers, as JSON has them, with every text in them redacted."""
    if isinstance(value, dict):
        return {key: tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(tree(inner) for inner in value)
    if isinstance(value, str):
        return url(value) if URL.match(value) else text(value)
    return value


def is_redacted(whole: str) -> bool:
    """Whether a secret was taken out of this URL, so that it leads nowhere."""
    return "://" in whole and re.search(rf"[/?&#]{REDACTED}(@|&|#|$)", whole) is not None


def _parts(rest: str) -> tuple[str, str, str, str]:
    """What stands behind ://: host (with user), /path, ?query and #fragment."""
    first = re.split("[/?#]", rest, maxsplit=1)[0]
    port = first.rpartition(":")[2]
    if "@" not in first and ":" in first and "@" in rest and not port.isdecimal() and not port.endswith("]"):
        rest = f"{REDACTED}@{rest.rpartition('@')[2]}"  # the password has one of /?# in it
    rest, hash_sign, fragment = rest.partition("#")
    rest, question_mark, query = rest.partition("?")
    host, slash, path = rest.partition("/")
    return host, slash + path, question_mark + query, hash_sign + fragment


def _parameters(part: str) -> str:
    """A ?query or #fragment without what is secret in it; of a signed one nothing stays that signing has put there."""
    sign, pieces = part[:1], re.split("([&;])", part[1:])
    words, joints = pieces[::2], ["", *pieces[1::2]]
    if not any(map(_is_secret, words)):
        return part
    kept = [
        (joint, word)
        for joint, word in zip(joints, words, strict=True)
        if word != REDACTED and not _is_secret(word) and not SIGNING.fullmatch(_name(word))
    ]
    whole = "".join(joint + word for joint, word in kept).lstrip("&;")
    return f"{sign}{whole}{'&' * bool(whole)}{REDACTED}"


def _name(word: str) -> str:
    return unquote(word.partition("=")[0])


def _is_secret(word: str) -> bool:
    _, equals, value = word.partition("=")
    named = bool(equals and value) and SECRET.search(_name(word)) is not None
    return named or TOKEN.match(unquote(value if equals else word)) is not None
