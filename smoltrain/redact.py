"""Secrets in URLs, taken out wherever a URL is written: user:password@, signatures, tokens and keys in a query.

A run folder, a console, W&B and a model card are read by others; the server alone needs the secret, and it comes from
the command line each time. What is left says that something was taken out, and is the same however often a URL is
signed anew.
"""

import re
from typing import Any
from urllib.parse import unquote

REDACTED = "REDACTED"
URL_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>`|\\^{}]+")
# Names of parameters whose values are secret: these words anywhere, or these others by themselves.
SECRET_NAME_PATTERN = re.compile(
    r"token|secret|passw|passphrase|pwd|signature|credential|apikey|accesskey|jwt|bearer|session|auth(?!or)"
    r"|(key|sig|hmac)$|(^|[^a-z])(key|sig|pass|sas|code|ticket|hmac)([^a-z]|$)",
    re.IGNORECASE,
)
# Values that are secret by how they begin, whatever they are called.
SECRET_VALUE_PATTERN = re.compile(
    r"eyJ[\w-]{8}|hf_\w{8}|gh[pousr]_\w{8}|github_pat_|glpat-|xox[abp]-|sk-[\w-]{8}|AKIA\w{8}|ASIA\w{8}"
)
# What else belongs to a signature: S3, Google, OSS, COS, CloudFront, and Azure's shared access signatures.
SIGNATURE_NAME_PATTERN = re.compile(
    r"x-(amz|goog|oss|cos|obs|ms)-.*|q-.*|expires|expiry|policy|key-pair-id|awsaccesskeyid|googleaccessid|ossaccesskeyid"
    r"|algorithm|s[vsertpi]|srt|spr|sip|sk[a-z]+|s[as]oid|suoid|scid|sdd|ses|hash-algorithm",
    re.IGNORECASE,
)
CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")  # CONTAINER@ACCOUNT is no user


def redact_url(url: str) -> str:
    """One URL without its secrets; any other text as it is."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, path, query, fragment = _split_url(rest)
    user, at, host = host.rpartition("@")
    if at and not (scheme.lower() in CONTAINER_SCHEMES and ":" not in user):
        user = REDACTED
    return f"{scheme}{separator}{user}{at}{host}{path}{_redact_parameters(query)}{_redact_parameters(fragment)}"


def redact_text(text: str) -> str:
    """Any text, with each URL in it redacted."""
    return URL_PATTERN.sub(lambda match: redact_url(match[0]), text) if "://" in text else text


def redact_tree(value: Any) -> Any:
    """Nested containers, as JSON has them, with every text in them redacted."""
    if isinstance(value, dict):
        return {key: redact_tree(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_tree(inner) for inner in value)
    if isinstance(value, str):
        return redact_url(value) if URL_PATTERN.match(value) else redact_text(value)
    return value


def is_redacted(url: str) -> bool:
    """Whether a secret was taken out of this URL, so that it leads nowhere."""
    return "://" in url and re.search(rf"[/?&#]{REDACTED}(@|&|#|$)", url) is not None


def _split_url(rest: str) -> tuple[str, str, str, str]:
    """What stands behind ://: host (with user), /path, ?query and #fragment."""
    first = re.split("[/?#]", rest, maxsplit=1)[0]
    port = first.rpartition(":")[2]
    if "@" not in first and ":" in first and "@" in rest and not port.isdecimal() and not port.endswith("]"):
        rest = f"{REDACTED}@{rest.rpartition('@')[2]}"  # the password has one of /?# in it
    rest, hash_sign, fragment = rest.partition("#")
    rest, question_mark, query = rest.partition("?")
    host, slash, path = rest.partition("/")
    return host, slash + path, question_mark + query, hash_sign + fragment


def _redact_parameters(part: str) -> str:
    """A ?query or #fragment without what is secret in it; of a signed one nothing stays that signing has put there."""
    sign = part[:1]
    pieces = re.split("([&;])", part[1:])
    parameters = pieces[::2]
    separators = ["", *pieces[1::2]]  # before each parameter
    if not any(map(_is_secret_parameter, parameters)):
        return part
    kept = ""
    for separator, parameter in zip(separators, parameters, strict=True):
        is_signature = SIGNATURE_NAME_PATTERN.fullmatch(_parameter_name(parameter))
        if parameter != REDACTED and not _is_secret_parameter(parameter) and not is_signature:
            kept += separator + parameter
    kept = kept.lstrip("&;")
    return f"{sign}{kept}&{REDACTED}" if kept else f"{sign}{REDACTED}"


def _parameter_name(parameter: str) -> str:
    return unquote(parameter.partition("=")[0])


def _is_secret_parameter(parameter: str) -> bool:
    _, equals, value = parameter.partition("=")
    if equals and value and SECRET_NAME_PATTERN.search(_parameter_name(parameter)):
        return True
    return SECRET_VALUE_PATTERN.match(unquote(value if equals else parameter)) is not None
