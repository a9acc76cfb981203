"""Words of messages."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Such as "1 object" or "2 classes"; the plural where it is not the noun with "s" or "es"."""
    ending = "es" if noun.endswith(("s", "x", "ch")) else "s"
    return f"{number} {noun if number == 1 else plural or noun + ending}"
