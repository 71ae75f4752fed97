"""Keys and e-mail addresses out of texts: replaced, not cut, and counted by kind.

What a key looks like is the knowledge of the library detect-secrets: its detectors of known formats
(cloud keys, tokens of code hosts and chats, private keys, passwords in URLs). Its guesses by
entropy and by variable names are left aside: on library code nearly all they find is no secret.
"""

import functools
import re
from collections import Counter

KEY = "<KEY>"
EMAIL = "name@example.com"
LEFT_ASIDE = {"Public IP (ipv4)"}  # four-part version numbers look the same
URL_PASSWORD = "Basic Auth Credentials"  # may be short
NEEDS = {  # detectors that are slow, or see keys in names, run where their provider is named
    "Artifactory Credentials": "artifactory",
    "Cloudant Credentials": "cloudant",
    "IBM COS HMAC Credentials": "ibm",
    "IBM Cloud IAM Key": "ibm",
    "SoftLayer Credentials": "softlayer",
}
_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9][A-Za-z0-9._%+-]*@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}(?![\w@])"
)
_NOBODY = re.compile(r"@(?:[\w-]+\.)*(?:example|localhost|invalid|test)\b", re.IGNORECASE)
_PRIVATE_KEY = re.compile(
    r"(-----BEGIN [A-Z ]*PRIVATE KEY-----)[^-]{64,}(-----END [A-Z ]*PRIVATE KEY-----)"
)


def mask(text: str) -> tuple[str, Counter]:
    """The text without keys and addresses, and how many of each kind were replaced."""
    counts: Counter = Counter()
    lower = text.lower()
    if "PRIVATE KEY" in text:
        text, found = _PRIVATE_KEY.subn(rf"\1{KEY}\2", text)
        counts["Private Key"] += found
    for kind, detector in _detectors():
        if NEEDS.get(kind, "") not in lower:
            continue
        for pattern in detector.denylist:
            text = pattern.sub(functools.partial(_mask_key, counts, kind, detector), text)
    if "@" in text:
        text = _EMAIL.sub(functools.partial(_mask_email, counts), text)
    return text, +counts


def _mask_email(counts: Counter, match: re.Match) -> str:
    if _NOBODY.search(match[0]):
        return match[0]
    counts["e-mail address"] += 1
    return EMAIL


def _mask_key(counts: Counter, kind: str, detector, match: re.Match) -> str:
    """The match with its secret masked: its longest group, or all of it where that is a prefix."""
    number = max(range(len(match.groups()) + 1), key=lambda i: (i > 0, len(match[i] or "")))
    if len(match[number]) < 16 and kind != URL_PASSWORD:
        number = 0
    valid = getattr(detector, "is_formally_valid", None)  # of JSON web tokens
    if match[number] in (KEY, "") or valid and not valid(match[0]):
        return match[0]
    counts[kind] += 1
    begin, end = (place - match.start() for place in match.span(number))
    return match[0][:begin] + KEY + match[0][end:]


@functools.cache
def _detectors() -> list[tuple[str, object]]:
    """The library's detectors of known formats: (kind, detector), in a fixed order."""
    try:
        from detect_secrets.core.plugins import util
    except ImportError:
        raise ValueError(
            "masking keys needs the package detect-secrets; install it, or switch masking off"
        ) from None
    from detect_secrets.plugins.base import RegexBasedDetector

    classes = util.get_mapping_from_secret_type_to_class()
    return [
        (kind, classes[kind]())
        for kind in sorted(classes)
        if issubclass(classes[kind], RegexBasedDetector)
        and kind not in LEFT_ASIDE | {"Private Key"}
    ]
