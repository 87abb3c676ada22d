"""Words of reports: lists, ranges and plurals."""


def listed(words, last="and"):
    *most, word = words
    return f"{', '.join(most)} {last} {word}" if most else word


def spanned(words):
    """Return the first and the last word, or the only one."""
    words = list(words)
    return listed(dict.fromkeys([words[0], words[-1]]), "to")


def plural(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"
